"use strict";
// A layered drawing, after Sugiyama: layers by longest path, order by barycentres, places by least squares.
// boxes: [{width, height, leaf}], operands before users; links: [{from, to}] (numbers of boxes). Gives each box x, y
// (its centre) and each link points, and returns the size of the whole.
function layOut(boxes, links, downwards) {
  const LAYER_GAP = downwards ? 64 : 84, GAP = 26;
  const users = boxes.map(() => []), operands = boxes.map(() => []);
  for (const link of links) { users[link.from].push(link.to); operands[link.to].push(link.from); }
  const layer = boxes.map(() => 0);
  boxes.forEach((_, i) => { for (const o of operands[i]) layer[i] = Math.max(layer[i], layer[o] + 1); });
  boxes.forEach((box, i) => {  // a leaf stands just before its first user
    if (box.leaf && users[i].length) layer[i] = Math.min(...users[i].map(u => layer[u])) - 1;
  });
  const lowest = Math.min(...layer);
  // Cells: boxes, and bends where a link passes a layer.
  const along = downwards ? "height" : "width", across = downwards ? "width" : "height";
  const cells = boxes.map((box, i) => ({ layer: layer[i] - lowest, size: box[across], before: [], after: [], pull: box.leaf ? 0.02 : 1 }));
  const routes = links.map(link => {
    const route = [cells[link.from]];
    for (let l = cells[link.from].layer + 1; l < cells[link.to].layer; l++) {
      const bend = { layer: l, size: 64, before: [], after: [], pull: 2 };
      cells.push(bend); route.push(bend);
    }
    route.push(cells[link.to]);
    for (let i = 1; i < route.length; i++) { route[i - 1].after.push(route[i]); route[i].before.push(route[i - 1]); }
    return route;
  });
  const layers = [];
  for (const cell of cells) (layers[cell.layer] ||= []).push(cell);
  const mean = (list, key) => list.reduce((sum, c) => sum + c[key], 0) / list.length;
  const renumber = cs => cs.forEach((cell, i) => { cell.at = i; });
  layers.forEach(renumber);
  for (let round = 0; round < 12; round++) {
    const side = round % 2 ? "after" : "before";
    for (const cs of round % 2 ? [...layers].reverse() : layers) {
      for (const cell of cs) cell.wish = cell[side].length ? mean(cell[side], "at") : cell.at;
      cs.sort((a, b) => a.wish - b.wish || a.at - b.at);
      renumber(cs);
    }
  }
  // Across: each cell near the mean of its neighbours, none overlapping (pool adjacent violators). Leaves hardly pull, so
  // that a chain of operations is straight.
  for (const cs of layers) { let end = 0; for (const c of cs) { c.place = end + c.size / 2; end += c.size + GAP; } }
  for (let round = 0; round < 24; round++) {
    const side = round > 20 ? null : round % 2 ? "after" : "before";
    for (const cs of round % 2 ? [...layers].reverse() : layers) {
      let offset = 0;
      const blocks = [];
      cs.forEach((cell, i) => {
        if (i) offset += (cs[i - 1].size + cell.size) / 2 + GAP;
        cell.offset = offset;
        const near = side ? cell[side] : [...cell.before, ...cell.after];
        const total = near.reduce((sum, c) => sum + c.pull, 0);
        const wish = near.length ? near.reduce((sum, c) => sum + c.pull * c.place, 0) / total : cell.place;
        blocks.push({ wish: wish - offset, weight: near.length ? cell.pull : 0.005, cells: [cell] });
        while (blocks.length > 1 && blocks.at(-2).wish > blocks.at(-1).wish) {
          const b = blocks.pop(), a = blocks.at(-1);
          a.wish = (a.wish * a.weight + b.wish * b.weight) / (a.weight + b.weight);
          a.weight += b.weight; a.cells.push(...b.cells);
        }
      });
      for (const block of blocks) for (const cell of block.cells) cell.place = block.wish + cell.offset;
    }
  }
  // Along: layers as deep as their largest box.
  let start = 0;
  const middle = layers.map((cs, l) => {
    const depth = Math.max(0, ...boxes.filter((_, i) => layer[i] - lowest === l).map(box => box[along]));
    const at = start + depth / 2;
    start += depth + LAYER_GAP;
    return at;
  });
  const smallest = Math.min(...cells.map(c => c.place - c.size / 2)), largest = Math.max(...cells.map(c => c.place + c.size / 2));
  const point = (a, c) => downwards ? [c - smallest, a] : [a, c - smallest];
  boxes.forEach((box, i) => { [box.x, box.y] = point(middle[cells[i].layer], cells[i].place); });
  // Links leave and arrive side by side, in the order of their other ends.
  const spread = (list, end, room) => list.forEach((link, i) => { link[end] = list.length < 2 ? 0 : room * (i / (list.length - 1) - 0.5); });
  const leaving = boxes.map(() => []), arriving = boxes.map(() => []);
  links.forEach((link, k) => {
    link.starts = routes[k][1].place; link.ends = routes[k].at(-2).place;
    leaving[link.from].push(link); arriving[link.to].push(link);
  });
  boxes.forEach((box, i) => {
    spread(arriving[i].sort((p, q) => p.ends - q.ends), "arrive", box[across] * 0.45);
    spread(leaving[i].sort((p, q) => p.starts - q.starts), "leave", box[across] * 0.45);
  });
  links.forEach((link, k) => {
    const route = routes[k], a = boxes[link.from], b = boxes[link.to], last = route.length - 1;
    link.points = route.map((cell, i) => point(
      i === 0 ? middle[cell.layer] + a[along] / 2 : i === last ? middle[cell.layer] - b[along] / 2 - 2 : middle[cell.layer],
      cell.place + (i === 0 ? link.leave : i === last ? link.arrive : 0)));
    link.path = curve(link.points, downwards);
  });
  const length = start - LAYER_GAP, breadth = largest - smallest;
  return downwards ? { width: breadth, height: length } : { width: length, height: breadth };
}

// A smooth curve through points that advance along one axis.
function curve(points, downwards) {
  let path = `M${points[0]}`;
  for (let i = 1; i < points.length; i++) {
    const [x0, y0] = points[i - 1], [x1, y1] = points[i];
    path += downwards ? `C${x0},${(y0 + y1) / 2} ${x1},${(y0 + y1) / 2} ${x1},${y1}` : `C${(x0 + x1) / 2},${y0} ${(x0 + x1) / 2},${y1} ${x1},${y1}`;
  }
  return path;
}
