// Walks the graph: step 0 knows the leaves; then each operation computes its value (and tangent); then the gradient of
// the result is 1 (or what was given); then each operation passes its gradient on to its operands.
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = data.nodes, $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg", CROWD = 40;
nodes.forEach((node, i) => { node.number = i; node.users = []; });
for (const node of nodes) for (const edge of node.inputs) { edge.to = node.number; nodes[edge.from].users.push(edge); }
const forwards = nodes.filter(n => n.kind === "op").map(n => n.number), backwards = data.backward;
forwards.forEach((n, i) => { nodes[n].computedAt = i + 1; });
backwards.forEach((n, i) => { nodes[n].passedAt = forwards.length + 2 + i; });
const seedAt = forwards.length + 1, end = backwards.length ? seedAt + backwards.length : forwards.length;
const hasTangents = nodes.some(n => n.tangent), hasValues = nodes.some(n => n.kind === "op" && n.value);
const isOutput = new Set(data.outputs);
let step = 0, selected = null, playing = null, downwards = null, view = { scale: 1, x: 0, y: 0 };
const collapsed = new Set();

// Numbers and arrays -------------------------------------------------------------------------------------------------

function number(x, digits = 5) {
  if (typeof x === "string") return x.replace("-", "−");
  if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x).replace("-", "−");
  const size = Math.abs(x);
  const text = size >= 1e6 || size < 1e-4 ? x.toExponential(3).replace("e+", "e") : String(Number(x.toPrecision(digits)));
  return text.replaceAll("-", "−");
}
const scalar = a => a && a.data && a.data.length === 1 ? a.data[0] : null;
function brief(a) {
  if (!a) return "";
  if (a.summary) return `${number(a.summary.min)} … ${number(a.summary.max)}`;
  if (!a.data.length) return "empty";
  if (a.data.length <= 3) return a.data.length === 1 ? number(a.data[0]) : `[${a.data.map(x => number(x)).join(", ")}]`;
  const finite = a.data.filter(x => typeof x === "number");
  return finite.length ? `${number(Math.min(...finite))} … ${number(Math.max(...finite))}` : "NaN";
}
function add(a, b) {
  if (!a || !a.data || !b.data || a.data.length !== b.data.length) return null;
  return { shape: a.shape, data: a.data.map((x, i) => typeof x === "number" && typeof b.data[i] === "number" ? x + b.data[i] : NaN) };
}

// What is known at a step --------------------------------------------------------------------------------------------

const isComputed = node => node.kind !== "op" || node.computedAt <= step;
// The gradient so far: {array, known, of}: how many of the contributions have arrived.
function gradientAt(node) {
  const parts = node.users.filter(edge => edge.sent), seed = isOutput.has(node.number) && node.gradient;
  const arrived = parts.filter(edge => nodes[edge.to].passedAt <= step);
  const of = parts.length, known = arrived.length;
  if (!node.gradient || step < seedAt || (!seed && !known)) return { array: null, known, of };
  if (known === of) return { array: node.gradient, known, of, whole: true };
  if (seed) return { array: null, known, of, whole: false };
  const sum = arrived.slice(1).reduce((total, edge) => total && add(total, edge.sent), arrived[0].sent);
  return { array: sum, known, of, whole: false };
}
function active() {
  if (step >= 1 && step <= forwards.length) return nodes[forwards[step - 1]];
  if (step === seedAt && backwards.length) return nodes[data.outputs[0]];
  return step > seedAt ? nodes[backwards[step - seedAt - 1]] : null;
}

// Modules ------------------------------------------------------------------------------------------------------------

// A large graph without modules is cut into parts of equal length, which collapse likewise.
const loose = nodes.filter(n => n.kind === "op" && !n.module), part = Math.max(20, Math.ceil(loose.length / CROWD));
if (loose.length > 3 * CROWD) loose.forEach((node, i) => {
  const start = i - i % part;
  node.module = `operations ${start + 1}–${Math.min(start + part, loose.length)}`;
  node.moduleType = "part";
});
const prefixes = path => path ? path.split(".").map((_, i, parts) => parts.slice(0, i + 1).join(".")) : [];
const modules = [...new Set(nodes.filter(n => n.kind === "op").flatMap(n => prefixes(n.module)))];
const hiddenIn = node => prefixes(node.module).find(path => collapsed.has(path));
// Boxes: nodes, and groups. A module that is called twice is a group for each call, so that no cycle can arise.
function boxesNow() {
  const boxes = [], boxOf = new Map(), first = new Map();
  let run = null;
  for (const node of nodes) {
    if (node.kind !== "op") continue;
    const path = hiddenIn(node);
    if (!path) { run = null; continue; }
    if (!run || run.path !== path) {
      const calls = (first.get(path)?.calls || 0) + 1;
      run = { path, nodes: [], call: calls };
      if (calls === 1) first.set(path, run);
      first.get(path).calls = calls;
    }
    run.nodes.push(node); boxOf.set(node, run);
  }
  const placed = new Set();
  const take = box => { box.number = boxes.length; boxes.push(box); };
  for (const node of nodes) {
    const path = node.kind !== "op" && node.kind !== "input" && hiddenIn(node), group = boxOf.get(node) || (path && first.get(path));
    if (!group) { const box = { nodes: [node], leaf: node.kind !== "op" }; boxOf.set(node, box); if (box.leaf) take(box); continue; }
    boxOf.set(node, group);
    if (node.kind !== "op") group.nodes.push(node);
  }
  for (const node of nodes) {
    const box = boxOf.get(node);
    if (node.kind === "op" && !placed.has(box)) { placed.add(box); take(box); }
  }
  return { boxes, boxOf };
}

// Drawing ------------------------------------------------------------------------------------------------------------

function make(name, attributes, parent, text) {
  const made = name.startsWith("html:") ? document.createElement(name.slice(5)) : document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== null) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
const clip = (text, length) => text.length > length ? text.slice(0, length - 1) + "…" : text;
// A module's own parameters by their short names.
const near = (node, text) => node.moduleType ? text.replaceAll(`${node.module}.`, "") : text;
const shapeOf = node => node.type.replace(/ on cpu$/, "");
let drawn = { boxes: [], links: [] };

function draw(fitToo) {
  const { boxes, boxOf } = boxesNow(), links = [], seen = new Map();
  for (const node of nodes) for (const edge of node.inputs) {
    const from = boxOf.get(nodes[edge.from]), to = boxOf.get(node);
    if (from === to) continue;
    const key = `${from.number} ${to.number}`;
    if ((from.path || to.path) && seen.has(key)) { seen.get(key).edges.push(edge); continue; }
    const link = { from: from.number, to: to.number, edges: [edge], beside: seen.has(key) };
    seen.set(key, link); links.push(link);
  }
  for (const box of boxes) {
    const node = box.nodes[0];
    if (box.path) {
      box.title = box.path + (box.call > 1 ? ` (call ${box.call})` : "");
      box.kind = `${(box.nodes.find(n => n.module === box.path && n.moduleType) || {}).moduleType || "module"} · ${box.nodes.filter(n => n.kind === "op").length} ops`;
      box.result = box.nodes.filter(n => n.kind === "op").at(-1);
    } else {
      box.title = clip(node.kind === "op" ? `${node.name} = ${near(node, node.formula)}` : node.name, 34);
      box.kind = clip(node.kind === "op" ? `${node.op}  ${shapeOf(node)}` : `${node.kind}  ${shapeOf(node)}`, 40);
      box.result = node;
    }
    box.rows = rowsOf(box.result);
    box.height = 48 + 18 * box.rows.length + (!box.path && tagOf(node) ? 14 : 0);
    box.width = Math.max(150, 28 + 7.7 * (box.title.length + (box.path ? 2 : 0)), 28 + 6.5 * box.kind.length, 90 + 7.7 * widest(box.result));
  }
  document.body.classList.toggle("crowd", boxes.length > 300);  // shadows cost too much there
  if (downwards === null) downwards = boxes.length > 14 || innerWidth < 860;
  const size = layOut(boxes, links, downwards);
  drawn = { boxes, links, size };
  $("edges").replaceChildren(); $("nodes").replaceChildren(); $("labels").replaceChildren();
  for (const link of links) {
    link.element = make("path", { d: link.path, class: "edge" }, $("edges"));
    const edge = link.edges[0];
    if (link.edges.length === 1 && !boxes[link.to].path) link.label = make("g", { class: "label" }, $("labels"));
    link.edge = edge;
  }
  for (const box of boxes) drawBox(box);
  $("collapse").hidden = $("expand").hidden = !modules.length;
  if (fitToo) fit();
  show();
}
const rowsOf = node => ["value", ...(node.tangent ? ["tangent"] : []), ...(node.gradient ? ["gradient"] : [])];
// The longest line that the box will ever show, so that nothing moves.
const widest = node => Math.max(brief(node.value).length, node.tangent ? brief(node.tangent).length : 0, node.gradient ? brief(node.gradient).length + 6 : 0);
const tagOf = node => node.kind === "op" && node.module;

function drawBox(box) {
  const node = box.result, left = box.x - box.width / 2, top = box.y - box.height / 2;
  const g = box.element = make("g", { class: "node", tabindex: 0, role: "button", transform: `translate(${left},${top})`,
    "data-node": box.path ? null : node.name, "data-group": box.path ? box.title : null, "aria-expanded": box.path ? "false" : null }, $("nodes"));
  make("rect", { class: "box", width: box.width, height: box.height, rx: box.nodes[0].kind === "op" || box.path ? 10 : 4 }, g);
  make("rect", { class: "stripe", x: 0, y: 8, width: 4, height: box.height - 16, rx: 2 }, g);
  let y = 21;
  if (!box.path && tagOf(node)) {
    const tag = make("text", { class: "tag", x: 14, y: y - 5 }, g, clip(`▾ ${node.module} · ${node.moduleType}`, 36));
    make("title", {}, tag, `Collapse ${node.module}`);
    tag.addEventListener("click", event => { event.stopPropagation(); toggle(node.module); });
    y += 14;
  }
  make("text", { class: "name", x: 14, y }, g, (box.path ? "▸ " : "") + box.title);
  make("text", { class: "kind", x: 14, y: y + 15 }, g, box.kind);
  y += 35;
  box.lines = {};
  for (const row of box.rows) {
    make("text", { class: "row", x: 14, y }, g, row);
    box.lines[row] = make("text", { class: row, x: 77, y }, g);
    y += 18;
  }
  g.addEventListener("click", () => { if (!moved) choose(box); });
  g.addEventListener("keydown", event => {
    if (event.key === "Enter") { event.preventDefault(); choose(box); }
  });
}
function choose(box) {
  if (box.path) toggle(box.path);
  else { selected = selected === box.result ? null : box.result; show(); }
}
function toggle(path) {
  if (!collapsed.delete(path)) {
    for (const other of [...collapsed]) if (other.startsWith(path + ".")) collapsed.delete(other);
    collapsed.add(path);
  }
  const focused = document.activeElement?.dataset?.module;
  draw(true);
  if (focused) document.querySelector(`[data-module="${CSS.escape(focused)}"]`)?.focus();
}

// What is there already is left alone: a step changes little of a large graph.
function put(element, attribute, value) { if (element.getAttribute(attribute) !== value) element.setAttribute(attribute, value); }
function write(element, text) { if (element.textContent !== text) element.textContent = text; }
function show() {
  const now = active(), back = step >= seedAt, shown = selected || now || nodes[data.outputs[0]];
  document.body.classList.toggle("backward", back);
  for (const box of drawn.boxes) {
    const node = box.result, known = box.nodes.every(isComputed), gradient = gradientAt(node);
    const classes = ["node", box.path ? "group" : node.kind];
    if (!known) classes.push("waiting");
    if (isOutput.has(node.number)) classes.push("output");
    if (now && box.nodes.includes(now)) classes.push(back ? "now-backward" : "now");
    if (box.nodes.includes(selected)) classes.push("selected");
    put(box.element, "class", classes.join(" "));
    const ops = box.nodes.filter(n => n.kind === "op"), computed = ops.filter(isComputed).length;
    const texts = {
      value: isComputed(node) ? brief(node.value) || "not kept" : box.path && computed ? `${computed} of ${ops.length} ops` : "",
      tangent: isComputed(node) ? brief(node.tangent) || "0" : "",
      gradient: gradient.array ? brief(gradient.array) + (gradient.whole ? "" : ` (${gradient.known}/${gradient.of})`)
        : gradient.known ? `${gradient.known} of ${gradient.of} parts` : "",
    };
    for (const [row, element] of Object.entries(box.lines)) {
      write(element, texts[row] || "?");
      put(element, "class", row + (texts[row] ? "" : " unknown") + (row === "gradient" && gradient.array && !gradient.whole ? " partial" : ""));
    }
    put(box.element, "aria-label", [box.title, texts.value && `value ${texts.value}`, hasTangents && texts.tangent && `tangent ${texts.tangent}`,
      texts.gradient && `gradient ${texts.gradient}`].filter(Boolean).join(", "));
  }
  for (const link of drawn.links) {
    const done = link.edges.every(e => isComputed(nodes[e.to])), passed = link.edges.every(e => e.sent && nodes[e.to].passedAt <= step);
    const at = now && link.edges.some(e => e.to === now.number) && step !== seedAt;
    const sending = at && back && link.edges.some(e => e.sent && e.to === now.number);
    put(link.element, "class", "edge" + (sending ? " now-backward" : at && !back ? " now" : passed ? " done" : done ? "" : " waiting"));
    const written = `${done} ${passed}`;
    if (link.label && link.written !== written) { link.written = written; label(link, done, passed); }
  }
  caption(now, back);
  inspect(shown);
  $("slider").value = step;
  $("slider").setAttribute("aria-valuetext", `step ${step} of ${end}`);
  $("first").disabled = $("back").disabled = step === 0;
  $("next").disabled = $("last").disabled = step === end;
}

// At an edge: the local derivative, and what was sent back along it.
function label(link, done, passed) {
  const edge = link.edge, local = scalar(edge.local), g = link.label;
  const symbol = edge.derivative && edge.derivative.length <= 12 ? edge.derivative : "";
  const derivative = done && local !== null ? (symbol && symbol !== number(local) ? `${symbol} = ${number(local, 4)}` : `×${number(local, 4)}`) : symbol && `×${symbol}`;
  const sent = passed && scalar(edge.sent) !== null ? `sends ${number(scalar(edge.sent), 4)}` : "";
  const lines = [[derivative, ""], [sent, "sent"]].filter(([text]) => text);
  g.replaceChildren();
  g.setAttribute("class", "label" + (done ? "" : " waiting"));
  if (!lines.length) return;
  const width = 8 + 6.8 * Math.max(...lines.map(([text]) => text.length)), points = link.points, n = points.length;
  const [a, b] = n % 2 ? [points[(n - 1) / 2], points[(n - 1) / 2]] : [points[n / 2 - 1], points[n / 2]];
  // On the curve, nearer to where it comes from: there links that cross are still apart.
  const t = link.beside ? 0.64 : 0.36, bend = 3 * t * t - 2 * t * t * t, straight = 1.5 * t * (1 - t) + t * t * t;
  const x = a[0] + (b[0] - a[0]) * (downwards ? bend : straight), y = a[1] + (b[1] - a[1]) * (downwards ? straight : bend);
  make("rect", { x: x - width / 2, y: y - 7.5 * lines.length, width, height: 15 * lines.length, rx: 4 }, g);
  lines.forEach(([text, kind], i) => make("text", { x, y: y - 7.5 * lines.length + 11.5 + 15 * i, class: kind }, g, text));
}

const result = () => nodes[data.outputs[0]].name;
function caption(now, back) {
  let text, small = `step ${step} of ${end}`;
  if (!now) text = end ? "The leaves are given. Step on (→) to compute." : "Nothing is computed here.";
  else if (!back) {
    text = `${now.name} = ${clip(near(now, now.formula), 64)}${now.numbers ? ` = ${clip(now.numbers, 64)}` : ""}${hasValues ? ` = ${brief(now.value)}` : ""}`;
    small += " · forwards";
  } else if (step === seedAt) { text = `∂${result()}/∂${result()} = ${brief(now.gradient)}: the walk back begins`; small += " · backwards"; }
  else {
    const sent = now.inputs.filter(e => e.sent).map(e => `${brief(e.sent)} to ${nodes[e.from].name}`);
    text = `${now.name} has its gradient, ${brief(now.gradient)}, and sends ${sent.join(", ")}`; small += " · backwards";
  }
  $("caption").replaceChildren(make("html:span", {}, null, text), make("html:small", {}, null, small));
}

// View and controls --------------------------------------------------------------------------------------------------

function place() { $("world").setAttribute("transform", `translate(${view.x},${view.y}) scale(${view.scale})`); }
function room() { const { width, height } = $("picture").getBoundingClientRect(); return { width, height }; }
function fit(whole) {
  const { width, height } = room(), margin = 40, top = 52, size = drawn.size;  // the tools stand at the top
  const exact = Math.min((width - margin) / size.width, (height - top - margin / 2) / size.height, 1.4);
  view.scale = whole ? exact : Math.max(exact, innerWidth < 860 ? 0.6 : 0.8);
  view.x = (width - size.width * view.scale) / 2;
  view.y = top + (height - top - margin / 2 - size.height * view.scale) / 2;
  if (!whole && exact < view.scale) {  // too large to be read whole: begin at the leaves
    if (size.height * view.scale > height - top && downwards) view.y = top;
    if (size.width * view.scale > width - margin && !downwards) view.x = 24;
  }
  place();
  follow();
}
function follow() {  // bring the active box into sight
  const now = active(), box = now && drawn.boxes.find(b => b.nodes.includes(now));
  if (!box) return;
  const { width, height } = room(), x = box.x * view.scale + view.x, y = box.y * view.scale + view.y;
  const w = box.width / 2 * view.scale + 4, h = box.height / 2 * view.scale + 4;
  // In the middle, but no further than the graph goes.
  const within = (at, shift, size, space, before) => Math.max(space - 24 - size * view.scale, Math.min(before, at + shift));
  if (x - w < 0 || x + w > width) view.x = within(view.x, width / 2 - x, drawn.size.width, width, 24);
  if (y - h < 0 || y + h > height) view.y = within(view.y, height / 2 - y, drawn.size.height, height, 52);
  place();
}
function zoom(factor, x, y) {
  const { width, height } = room(), cx = x ?? width / 2, cy = y ?? height / 2, scale = Math.min(4, Math.max(0.05, view.scale * factor));
  view.x = cx - (cx - view.x) * scale / view.scale; view.y = cy - (cy - view.y) * scale / view.scale; view.scale = scale;
  place();
}
function go(to) {
  step = Math.max(0, Math.min(end, to));
  if (selected && active() && playing === null && active() !== selected) selected = null;
  show(); follow();
  if (step === end) stop();
}
function stop() { clearInterval(playing); playing = null; $("play").textContent = "play"; }
function play() {
  if (playing !== null) return stop();
  if (step === end) go(0);
  $("play").textContent = "pause";
  playing = setInterval(() => go(step + 1), 1100);
}
let dragging = null, moved = false;
const picture = $("picture");
picture.addEventListener("pointerdown", event => { dragging = [event.clientX, event.clientY, view.x, view.y]; moved = false; });
addEventListener("pointermove", event => {
  if (!dragging) return;
  const dx = event.clientX - dragging[0], dy = event.clientY - dragging[1];
  if (Math.hypot(dx, dy) > 4) moved = true;
  if (moved) { view.x = dragging[2] + dx; view.y = dragging[3] + dy; picture.classList.add("dragging"); place(); }
});
addEventListener("pointerup", () => { dragging = null; picture.classList.remove("dragging"); });
picture.addEventListener("wheel", event => {
  event.preventDefault();
  const { left, top } = picture.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 500), event.clientX - left, event.clientY - top);
}, { passive: false });
picture.addEventListener("focusin", event => {
  const box = drawn.boxes.find(b => b.element === event.target);
  if (!box || !box.element.matches(":focus-visible")) return;
  const { width, height } = room(), x = box.x * view.scale + view.x, y = box.y * view.scale + view.y;
  if (x < 0 || x > width) view.x += width / 2 - x;
  if (y < 0 || y > height) view.y += height / 2 - y;
  place();
});
$("first").onclick = () => { stop(); go(0); };
$("back").onclick = () => { stop(); go(step - 1); };
$("next").onclick = () => { stop(); go(step + 1); };
$("last").onclick = () => { stop(); go(end); };
$("play").onclick = play;
$("slider").max = end;
$("slider").oninput = () => { stop(); go(Number($("slider").value)); };
$("in").onclick = () => zoom(1.25);
$("out").onclick = () => zoom(0.8);
$("fit").onclick = () => fit(true);
$("turn").onclick = () => { downwards = !downwards; draw(true); };
$("collapse").onclick = () => { collapsed.clear(); for (const path of modules) if (!path.includes(".")) collapsed.add(path); draw(true); };
$("expand").onclick = () => { collapsed.clear(); draw(true); };
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
  const keys = { ArrowRight: () => go(step + 1), ArrowLeft: () => go(step - 1), Home: () => go(0), End: () => go(end), Escape: () => { selected = null; show(); } };
  if (event.key === " " && !event.target.matches("button, summary")) { event.preventDefault(); play(); }
  else if (keys[event.key]) { event.preventDefault(); if (playing !== null) stop(); keys[event.key](); }
});
const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = isDark => { document.documentElement.dataset.theme = isDark ? "dark" : "light"; };
setTheme(dark.matches);
dark.addEventListener("change", () => setTheme(dark.matches));
$("theme").onclick = () => setTheme(document.documentElement.dataset.theme !== "dark");
addEventListener("resize", () => fit());

// The start: large graphs collapsed to as many levels of modules as fit a crowd.
const depthOf = path => path.split(".").length;
for (let depth = Math.max(0, ...modules.map(depthOf)); depth >= 1 && boxesNow().boxes.length > CROWD; depth--) {
  collapsed.clear();
  for (const path of modules) if (depthOf(path) === depth) collapsed.add(path);
}
const ops = forwards.length, leaves = nodes.length - ops;
$("title").textContent = data.title;
$("facts").textContent = `${ops} operation${ops === 1 ? "" : "s"} on ${leaves} ${leaves === 1 ? "leaf" : "leaves"}` + (data.saved ? ` · ${data.saved.toLocaleString("en")} bytes saved for the gradient` : "");
$("legend-tangent").hidden = !hasTangents;
$("legend-gradient").hidden = !backwards.length;
$("phase-forward").style.flex = forwards.length || 1;
$("phase-backward").style.flex = end - forwards.length;
$("phase-backward").hidden = !backwards.length;
draw(true);
