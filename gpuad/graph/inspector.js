// The node in detail, beside the picture: its equations, numbers, local derivatives, source line and programs.
function matrix(a, kind) {
  if (!a) return make("html:p", { class: "later" }, null, "not known");
  if (a.summary) {
    const { min, mean, max, norm } = a.summary;
    return make("html:p", { class: "mono" }, null, `min ${number(min)} · mean ${number(mean)} · max ${number(max)} · norm ${number(norm)}`);
  }
  if (a.data.length === 1) return make("html:p", { class: `mono ${kind}` }, null, number(a.data[0]));
  const columns = a.shape.at(-1) || 1, most = Math.max(...a.data.map(x => typeof x === "number" ? Math.abs(x) : 0)) || 1;
  const scroll = make("html:div", { class: "scroll" }), table = make("html:table", { class: "matrix mono" }, scroll);
  for (let i = 0; i < a.data.length; i += columns) {
    const row = make("html:tr", {}, table);
    for (const x of a.data.slice(i, i + columns)) {
      const cell = make("html:td", { title: number(x, 7) }, row, number(x, 4)), strength = typeof x === "number" ? Math.round(Math.abs(x) / most * 42) : 0;
      cell.style.background = `color-mix(in srgb, var(${x < 0 ? "--gradient" : "--value"}) ${strength}%, transparent)`;
    }
  }
  return scroll;
}
function equation(parent, kind, text) { make("html:span", { class: `equation ${kind}` }, parent, text); }

function inspect(node) {
  const panel = $("inspector"), opened = panel.dataset.node === node.name && panel.querySelector("details")?.open, chosen = panel.querySelector("select")?.value;
  panel.dataset.node = node.name;
  panel.replaceChildren();
  const heading = text => make("html:h3", {}, panel, text), ready = isComputed(node), gradient = gradientAt(node);
  make("html:h2", { class: "mono" }, panel, node.name);
  make("html:p", { class: "what" }, panel, [node.kind === "op" ? node.op : node.kind, node.type, node.moduleType && node.moduleType !== "part" && `module ${node.module} (${node.moduleType})`].filter(Boolean).join(" · "));
  if (node.formula) {
    equation(panel, "value", `${node.name} = ${near(node, node.formula)}` + (ready && node.numbers ? ` = ${node.numbers} = ${brief(node.value)}` : ""));
  }
  if (node.value || node.kind !== "op") { heading("value"); panel.append(ready ? matrix(node.value, "value") : later("computed in a later step")); }
  if (hasTangents && (node.tangent || node.inputs.length)) {
    heading("tangent");
    const parts = node.inputs.filter(e => nodes[e.from].tangent && scalar(e.local) !== null && scalar(nodes[e.from].tangent) !== null);
    if (ready && parts.length) equation(panel, "tangent", `Σ local derivative · tangent = ${parts.map(e => `${wrap(scalar(e.local))}·${wrap(scalar(nodes[e.from].tangent))}`).join(" + ")} = ${brief(node.tangent)}`);
    else panel.append(!ready ? later("computed with the value") : node.tangent ? matrix(node.tangent, "tangent") : later("0: it does not move"));
  }
  if (backwards.length && node.gradient) {
    heading(`gradient ∂${result()}/∂${node.name}`);
    const parts = node.users.filter(e => e.sent && nodes[e.to].passedAt <= step);
    if (gradient.array && parts.length && parts.every(e => scalar(e.sent) !== null && scalar(e.local) !== null && nodes[e.to].gradient)) {
      equation(panel, "gradient", parts.map(e => `${wrap(scalar(nodes[e.to].gradient))}·${wrap(scalar(e.local))} (by ${nodes[e.to].name})`).join(" + ") + ` = ${brief(gradient.array)}` + (gradient.whole ? "" : " so far"));
    } else panel.append(gradient.array ? matrix(gradient.array, "gradient") : later(gradient.known ? `${gradient.known} of ${gradient.of} parts have arrived` : "arrives in a later step"));
    if (gradient.array && !gradient.whole) make("html:p", { class: "later" }, panel, `${gradient.known} of ${gradient.of} parts have arrived.`);
  }
  if (node.inputs.length) {
    heading("local derivatives");
    const table = make("html:table", {}, panel), head = make("html:tr", {}, make("html:thead", {}, table)), body = make("html:tbody", {}, table);
    for (const title of ["by", "derivative", ...(backwards.length ? ["sends back"] : [])]) make("html:th", { scope: "col" }, head, title);
    for (const edge of node.inputs) {
      const row = make("html:tr", {}, body), local = ready ? brief(edge.local) : "";
      make("html:td", { class: "mono", title: nodes[edge.from].name }, row, near(node, nodes[edge.from].name));
      const derivative = near(node, edge.derivative) || (edge.rule && `g ↦ ${edge.rule}`) || "–";
      make("html:td", { class: "mono" }, row, derivative + (local && local !== derivative ? ` = ${local}` : ""));
      if (backwards.length) make("html:td", { class: "mono gradient" }, row, edge.sent ? (node.passedAt <= step ? brief(edge.sent) : "?") : "–");
    }
  }
  heading("where and what");
  const facts = make("html:dl", {}, panel), fact = (term, text) => { make("html:dt", {}, facts, term); return make("html:dd", {}, facts, text); };
  if (node.kind === "op") fact("saved for the gradient", node.saved ? `${node.saved} bytes` : "nothing");
  if (node.place) {
    fact("called at", node.place.at).classList.add("mono");
    const line = make("html:pre", {}, panel), { text, expression } = node.place, at = expression ? text.indexOf(expression) : -1;
    if (at < 0) line.textContent = text;
    else line.append(text.slice(0, at), make("html:mark", {}, null, expression), text.slice(at + expression.length));
  }
  if (node.program !== undefined) sources(panel, data.programs[node.program], opened, chosen);
  if (modules.length) moduleList(panel);
}
const wrap = x => typeof x === "number" && x < 0 ? `(${number(x)})` : number(x);
const later = text => make("html:p", { class: "later" }, null, text);

function sources(panel, programs, opened, chosen) {
  const titles = Object.keys(programs), details = make("html:details", {}, panel);
  details.open = Boolean(opened);
  make("html:summary", {}, details, "what runs: the program");
  const select = make("html:select", { "aria-label": "Program" }, details), code = make("html:pre", { tabindex: 0 }, details);
  for (const title of titles) make("html:option", { value: title }, select, title);
  if (titles.includes(chosen)) select.value = chosen;
  select.onchange = () => { code.textContent = programs[select.value]; };
  select.onchange();
}
function moduleList(panel) {
  make("html:h3", {}, panel, "modules");
  const list = make("html:ul", { class: "modules" }, panel);
  for (const path of modules) {
    const parents = prefixes(path).slice(0, -1);
    if (parents.some(p => collapsed.has(p))) continue;
    const item = make("html:li", {}, list), open = !collapsed.has(path);
    item.style.paddingLeft = `${parents.length * 14}px`;
    const button = make("html:button", { type: "button", "data-module": path, "aria-expanded": open }, item, `${open ? "▾" : "▸"} ${path}`);
    button.onclick = () => toggle(path);
  }
}
