// Map
const dark = matchMedia("(prefers-color-scheme: dark)");
const hue = id => `hsl(${(id * 137.508 + 190) % 360} ${dark.matches ? "62% 66%" : "60% 42%"})`;
const filled = [...new Set(cluster)].sort((a, b) => a - b);
const map = data.map, rows = map && column(map.row, Uint32Array);
const xs = map && column(map.x, Uint16Array), ys = map && column(map.y, Uint16Array);
const sheet = new Image();
const paints = {
  cluster: r => hue(cluster[r]),
  label: r => label[r] < 0 ? "#888" : hue(label[r]),
  confidence: r => ramp(confidence[r] / 255),
  agreement: r => ramp(agreement[r] / 255),
  reliable: r => flags[r] & 1 ? hue(0) : dark.matches ? "#6b675f" : "#bdb8ad",
};
const ramp = t => `hsl(${20 + 170 * t} 60% ${dark.matches ? 50 + 16 * t : 52 - 12 * t}%)`;
function fitted(canvas) {
  const ratio = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * ratio); canvas.height = Math.round(box.height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [pen, box.width, box.height];
}
function drawMap() {
  const canvas = $("canvas");
  const view = {x: .5, y: .5, zoom: 1};
  let at = -1, kept = [];
  const pixel = (i, w, h) => {
    const side = Math.min(w, h) - 36;
    return [w / 2 + (xs[i] / 65535 - view.x) * side * view.zoom, h / 2 - (ys[i] / 65535 - view.y) * side * view.zoom];
  };
  const tileAt = i => [i % map.perRow * map.tile, Math.floor(i / map.perRow) * map.tile];
  function draw() {
    const [pen, w, h] = fitted(canvas);
    const paint = paints[$("colour").value], only = passes[$("which").value], pictures = $("thumbs").checked;
    const size = pictures ? Math.min(56, 14 * Math.sqrt(view.zoom) + 6) : Math.max(2, Math.min(4.5, 150 / Math.sqrt(rows.length))) * Math.sqrt(view.zoom);
    pen.clearRect(0, 0, w, h);
    pen.imageSmoothingEnabled = map.tile >= 32;
    kept = [];
    rows.forEach((r, i) => {
      if (!only(r)) return;
      const [x, y] = pixel(i, w, h);
      if (x < -30 || y < -30 || x > w + 30 || y > h + 30) return;
      kept.push(i);
      pen.globalAlpha = pictures ? 1 : .75;
      pen.fillStyle = paint(r);
      if (pictures) {
        const [left, top] = tileAt(i);
        pen.fillRect(x - size / 2 - 1.5, y - size / 2 - 1.5, size + 3, size + 3);
        pen.drawImage(sheet, left, top, map.tile, map.tile, x - size / 2, y - size / 2, size, size);
      } else { pen.beginPath(); pen.arc(x, y, size, 0, 7); pen.fill(); }
    });
    if (at >= 0) {
      const [x, y] = pixel(at, w, h);
      pen.globalAlpha = 1; pen.strokeStyle = getComputedStyle(document.body).color; pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, pictures ? size * .8 : size + 4, 0, 7); pen.stroke();
    }
    legend();
  }
  function legend() {
    const by = $("colour").value, key = $("key"), lines = [];
    if (by === "cluster") for (const id of filled) lines.push([hue(id), nameOf(id)]);
    else if (by === "label") data.classes.forEach((name, id) => lines.push([hue(id), name]));
    else if (by === "reliable") lines.push([paints.reliable(-1) && hue(0), "reliable"], [dark.matches ? "#6b675f" : "#bdb8ad", "not reliable"]);
    else for (const t of [0, .25, .5, .75, 1]) lines.push([ramp(t), t.toFixed(2)]);
    key.replaceChildren(...lines.map(([colour, name]) => {
      const line = make("li"), dot = make("i");
      dot.style.background = colour;
      line.append(dot, spoken(name));
      return line;
    }));
  }
  function choose(i) {
    if (i === at) return;
    at = i;
    const r = rows[i], side = 128, point = $("point");
    const thumb = make("div", "", {className: "thumb"});
    const [left, top] = tileAt(i), scale = side / map.tile;
    thumb.style.background = `url(${map.atlas}) ${-left * scale}px ${-top * scale}px / ${map.perRow * side}px auto`;
    const lines = [nameOf(cluster[r]), spoken(data.keys[r]), "confidence " + share(confidence[r]) + ", agreement " + share(agreement[r]) + (flags[r] & 1 ? ", reliable" : "")];
    if (truthOf(r) !== null) lines.push("truth: " + spoken(truthOf(r)));
    const larger = make("button", "Larger, with its nearest images", {type: "button"});
    larger.addEventListener("click", () => showImage(r));
    point.replaceChildren(thumb, ...lines.map((line, n) => n ? make("p", line) : make("h4", line)), larger);
    draw();
  }
  function near(event, reach) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = reach * reach;
    for (const i of kept) {
      const [px, py] = pixel(i, box.width, box.height), d = (px - x) ** 2 + (py - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }
  function zoom(factor) { view.zoom = Math.min(40, Math.max(1, view.zoom * factor)); if (view.zoom === 1) view.x = view.y = .5; draw(); }
  const held = new Map();
  let moved = 0, spread = 0;
  canvas.addEventListener("pointerdown", event => { held.set(event.pointerId, event); canvas.setPointerCapture(event.pointerId); moved = 0; spread = 0; });
  canvas.addEventListener("pointermove", event => {
    const before = held.get(event.pointerId);
    if (!before) { const i = near(event, 24); if (i >= 0) choose(i); return; }
    if (held.size === 2) {
      const [a, b] = [...held.values()], gap = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
      if (spread) zoom(gap / spread);
      spread = gap; moved = 99;
    } else if (view.zoom > 1) {
      const box = canvas.getBoundingClientRect(), side = (Math.min(box.width, box.height) - 36) * view.zoom;
      view.x -= (event.clientX - before.clientX) / side; view.y += (event.clientY - before.clientY) / side;
      draw();
    }
    moved += Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY);
    held.set(event.pointerId, event);
  });
  const release = event => {
    if (held.delete(event.pointerId) && event.type === "pointerup" && moved < 6) { const i = near(event, 40); if (i >= 0) choose(i); }
    canvas.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("dblclick", () => { if (at >= 0) { view.x = xs[at] / 65535; view.y = ys[at] / 65535; zoom(2); } });
  canvas.addEventListener("wheel", event => { if (event.ctrlKey || view.zoom > 1) { event.preventDefault(); zoom(Math.exp(-event.deltaY / 300)); } }, {passive: false});
  canvas.addEventListener("keydown", event => {
    if (event.key === "Enter" && at >= 0) { reveal(cluster[rows[at]]); const target = $("cluster-" + cluster[rows[at]]); target.scrollIntoView(); target.querySelector(".tile")?.focus({preventScroll: true}); return; }
    if (event.key === "+" || event.key === "-") { zoom(event.key === "+" ? 1.5 : 1 / 1.5); return; }
    const way = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!way || !kept.length) return;
    event.preventDefault();
    if (at < 0 || !kept.includes(at)) return choose(kept[0]);
    const box = canvas.getBoundingClientRect(), [x, y] = pixel(at, box.width, box.height);
    let best = -1, least = Infinity;
    for (const i of kept) {
      const [px, py] = pixel(i, box.width, box.height), dx = px - x, dy = py - y;
      const along = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      if (along > 1 && aside <= along && along + 2 * aside < least) { least = along + 2 * aside; best = i; }
    }
    if (best >= 0) choose(best);
  });
  $("closer").onclick = () => zoom(1.6);
  $("wider").onclick = () => zoom(1 / 1.6);
  $("fit").onclick = () => { view.zoom = 1; zoom(1); };
  for (const id of ["colour", "which", "thumbs"]) $(id).addEventListener("change", draw);
  addEventListener("resize", draw);
  dark.addEventListener("change", draw);
  draw();
  return draw;
}
function drawPair() {
  for (const canvas of document.querySelectorAll(".pair canvas")) {
    const [pen, w, h] = fitted(canvas), only = passes[canvas.dataset.which];
    pen.globalAlpha = .75;
    rows.forEach((r, i) => {
      if (!only(r)) return;
      pen.fillStyle = hue(cluster[r]);
      pen.beginPath();
      pen.arc(10 + xs[i] / 65535 * (w - 20), h - 10 - ys[i] / 65535 * (h - 20), 1.6, 0, 7);
      pen.fill();
    });
  }
}
let redraw = () => {};
if (map) {
  sheet.onload = () => { redraw = drawMap(); drawPair(); addEventListener("resize", drawPair); dark.addEventListener("change", drawPair); };
  sheet.src = map.atlas;
}
