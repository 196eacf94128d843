"use strict";
(() => {
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const column = (text, Type) => text ? new Type(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer) : null;
const listed = column(data.listed, Uint32Array);
const cluster = column(data.cluster, Uint16Array), confidence = column(data.confidence, Uint8Array);
const agreement = column(data.agreement, Uint8Array), flags = column(data.flags, Uint8Array);
const label = column(data.label, Int16Array);
const rowOf = new Map();
if (listed) listed.forEach((image, row) => rowOf.set(image, row));
const row = image => listed ? rowOf.get(image) : image;
const imageOf = row => listed ? listed[row] : row;
const make = (tag, text, more) => Object.assign(document.createElement(tag), text === undefined ? {} : {textContent: text}, more);
const share = byte => (byte / 255).toFixed(2);
const spoken = text => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu, c => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
const count = (number, what) => number.toLocaleString("en") + " " + what + (number === 1 ? "" : "s");
const passes = {all: () => true, reliable: r => flags[r] & 1, unreliable: r => !(flags[r] & 1), unsure: r => flags[r] & 2};
document.body.classList.add("live");
document.querySelectorAll(".script").forEach(part => part.hidden = false);

// Edits: what a person changed, and what it was before each change.
let edits = {names: {...data.names}, merge: {}, split: {}, move: {}};
const past = [];
const nameOf = id => edits.names[id] || "Cluster " + id;
const root = id => { while (edits.merge[id] !== undefined) id = edits.merge[id]; return id; };
const truthOf = r => label && label[r] >= 0 ? data.classes[label[r]] : null;

// One picture, large
const dialog = $("one");
function showOne(tile) {
  const image = Number(tile.dataset.i), r = row(image), big = dialog.querySelector(".big");
  const style = getComputedStyle(tile);
  if (data.review.image) { big.style.backgroundImage = `url("${data.review.image}${image}")`; big.style.backgroundSize = "100% 100%"; big.style.backgroundPosition = "0 0"; }
  else { big.style.backgroundImage = style.backgroundImage; big.style.backgroundSize = style.backgroundSize; big.style.backgroundPosition = style.backgroundPosition; }
  if (tile.dataset.look && lookAt.checked) {
    const shade = getComputedStyle(tile, "::after");
    for (const part of ["Image", "Size", "Position", "Repeat"]) big.style["background" + part] = shade["background" + part] + ", " + (big.style["background" + part] || "no-repeat");
  }
  $("one-title").textContent = spoken(data.keys[r]);
  const list = dialog.querySelector("dl");
  list.replaceChildren();
  const facts = [["Cluster", nameOf(cluster[r])], ["Confidence", share(confidence[r])], ["Agreement", share(agreement[r])], ["Reliable", flags[r] & 1 ? "yes" : "no"]];
  if (tile.dataset.look) facts.push(["Looks at", tile.dataset.look]);
  if (truthOf(r) !== null) facts.push(["Truth", truthOf(r)]);
  for (const [name, value] of facts) { const line = make("div"); line.append(make("dt", name), make("dd", spoken(value))); list.append(line); }
  dialog.showModal();
}

// Where the network looks, over the prototypes
const lookAt = $("look");
lookAt?.addEventListener("change", () => $("list").classList.toggle("looking", lookAt.checked));

// Walls: one tab stop each, arrow keys within
const walls = [...document.querySelectorAll(".cluster .wall")];
const tilesOf = wall => [...wall.querySelectorAll(".tile")].filter(tile => !tile.parentElement.hidden);
function ready(wall) {
  wall.querySelectorAll(".tile").forEach((tile, i) => { tile.tabIndex = i ? -1 : 0; tile.setAttribute("role", "button"); tile.setAttribute("aria-label", tile.title); });
}
walls.forEach(ready);
let editing = false;
const picked = new Set();
function press(tile) {
  if (!editing) return showOne(tile);
  const image = Number(tile.dataset.i);
  picked.has(image) ? picked.delete(image) : picked.add(image);
  drawPicked();
}
$("list").addEventListener("click", event => { const tile = event.target.closest(".tile"); if (tile) press(tile); });
$("list").addEventListener("keydown", event => {
  const tile = event.target.closest(".tile");
  if (!tile) return;
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return press(tile); }
  const tiles = tilesOf(tile.closest(".wall")), at = tiles.indexOf(tile);
  const wide = tiles.filter(each => each.offsetTop === tiles[0].offsetTop).length;
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide, Home: -at, End: tiles.length - 1 - at}[event.key];
  const next = step === undefined ? null : tiles[at + step];
  if (step === undefined) return;
  event.preventDefault();
  if (next) { tile.tabIndex = -1; next.tabIndex = 0; next.focus(); }
});

// Search, filter, order
const articles = [...document.querySelectorAll(".cluster")];
const lower = data.keys.map(key => key.toLowerCase());
function search() {
  const query = $("find").value.trim().toLowerCase(), only = passes[$("only").value];
  document.querySelectorAll("#list .tile").forEach(tile => tile.parentElement.hidden = !only(row(Number(tile.dataset.i))));
  walls.forEach(wall => {
    const tiles = tilesOf(wall);
    wall.parentElement.hidden = !tiles.length;
    wall.querySelectorAll(".tile").forEach(tile => tile.tabIndex = tile === tiles[0] ? 0 : -1);
  });
  const found = $("found");
  found.replaceChildren();
  let hits = [];
  if (query) lower.forEach((key, r) => { if (key.includes(query)) hits.push(r); });
  const within = new Set(hits.map(r => cluster[r]));
  let shown = 0;
  for (const article of articles) {
    const id = Number(article.dataset.id);
    const words = `cluster ${id} ${nameOf(id)} ${article.dataset.truth}`.toLowerCase();
    const match = !query || words.includes(query) || within.has(id);
    article.hidden = !match;
    shown += match;
  }
  for (const r of query ? hits.slice(0, 50) : []) {
    const line = make("li"), link = make("a", nameOf(cluster[r]), {href: "#cluster-" + cluster[r]});
    line.append(make("b", spoken(data.keys[r])), link, make("span", "confidence " + share(confidence[r])));
    found.append(line);
  }
  found.hidden = !query || !hits.length;
  const where = listed ? ` (of the ${listed.length.toLocaleString("en")} shown or drawn)` : "";
  $("status").textContent = query
    ? `${count(shown, "cluster")}, ${count(hits.length, "file")}${where}${hits.length > 50 ? "; the first 50 are listed" : ""}`
    : "";
}
let waiting;
$("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
$("only").addEventListener("change", search);
$("order").addEventListener("change", () => {
  const by = {id: a => +a.dataset.id, large: a => -a.dataset.size, small: a => +a.dataset.size, doubt: a => -a.dataset.doubt}[$("order").value];
  $("list").append(...articles.sort((a, b) => by(a) - by(b) || a.dataset.id - b.dataset.id));
});

// Map
const dark = matchMedia("(prefers-color-scheme: dark)");
const hue = id => `hsl(${(id * 137.508 + 190) % 360} ${dark.matches ? "62% 66%" : "60% 42%"})`;
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
  const place = (i, w, h) => {
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
      const [x, y] = place(i, w, h);
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
      const [x, y] = place(at, w, h);
      pen.globalAlpha = 1; pen.strokeStyle = getComputedStyle(document.body).color; pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, pictures ? size * .8 : size + 4, 0, 7); pen.stroke();
    }
    legend();
  }
  function legend() {
    const by = $("colour").value, key = $("key"), lines = [];
    if (by === "cluster") for (let id = 0; id < data.numClusters; id++) lines.push([hue(id), nameOf(id)]);
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
    point.replaceChildren(thumb, ...lines.map((line, n) => n ? make("p", line) : make("h4", line)));
    draw();
  }
  function near(event, reach) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = reach * reach;
    for (const i of kept) {
      const [px, py] = place(i, box.width, box.height), d = (px - x) ** 2 + (py - y) ** 2;
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
    if (event.key === "Enter" && at >= 0) { const target = $("cluster-" + cluster[rows[at]]); target.scrollIntoView(); target.querySelector(".tile")?.focus({preventScroll: true}); return; }
    if (event.key === "+" || event.key === "-") { zoom(event.key === "+" ? 1.5 : 1 / 1.5); return; }
    const way = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!way || !kept.length) return;
    event.preventDefault();
    if (at < 0 || !kept.includes(at)) return choose(kept[0]);
    const box = canvas.getBoundingClientRect(), [x, y] = place(at, box.width, box.height);
    let best = -1, least = Infinity;
    for (const i of kept) {
      const [px, py] = place(i, box.width, box.height), dx = px - x, dy = py - y;
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

// Name, merge, split, move
const ids = [...Array(data.numClusters).keys()];
function change(what) {
  past.push(JSON.stringify(edits));
  what();
  drawEdits();
}
function fillTargets(select, without, first) {
  const value = select.value;
  select.replaceChildren(...(first ? [make("option", first, {value: ""})] : []), ...ids.filter(id => id !== without).map(id => make("option", nameOf(id) === "Cluster " + id ? nameOf(id) : `${id} ${nameOf(id)}`, {value: id})));
  select.value = value;
}
const panels = new Map();
function panel(article) {
  const id = Number(article.dataset.id), box = make("div", undefined, {className: "edit"});
  const field = (text, input) => { const wrap = make("label", text + " "); wrap.append(input); box.append(wrap); return input; };
  const name = field("Name", make("input", undefined, {type: "text", maxLength: 80}));
  const merge = field("Merge into", make("select"));
  const split = field("Split into", make("input", undefined, {type: "number", min: 1, max: 20, value: 1}));
  const becomes = make("p", "", {className: "becomes"});
  box.append(becomes);
  name.addEventListener("change", () => change(() => { const text = name.value.trim(); if (text) edits.names[id] = text; else delete edits.names[id]; }));
  merge.addEventListener("change", () => change(() => {
    delete edits.merge[id];
    if (merge.value !== "" && root(Number(merge.value)) !== id) { edits.merge[id] = Number(merge.value); delete edits.split[id]; }
  }));
  split.addEventListener("change", () => change(() => { const parts = Math.round(Number(split.value)); if (parts > 1 && parts <= 20) edits.split[id] = parts; else delete edits.split[id]; }));
  if (data.review.image && Number(article.dataset.size)) {
    const more = make("button", "Show all images", {type: "button"});
    more.addEventListener("click", () => showAll(article, id, more));
    box.insertBefore(more, becomes);
  }
  article.querySelector("header").after(box);
  panels.set(id, {box, name, merge, split, becomes});
}
function showAll(article, id, more) {
  let wall = article.querySelector(".wall.everything");
  if (!wall) {
    const part = make("div");
    wall = make("ul", undefined, {className: "wall everything"});
    wall.setAttribute("role", "list");
    wall.setAttribute("aria-label", "All images of cluster " + id);
    part.append(make("h4", "All images"), wall);
    article.append(part);
    walls.push(wall);
    wall.left = [...cluster.keys()].filter(r => cluster[r] === id);
  }
  for (const r of wall.left.splice(0, 200)) {
    const line = make("li"), picture = make("img", undefined, {className: "tile", loading: "lazy", src: data.review.image + imageOf(r), title: spoken(data.keys[r]), alt: spoken(data.keys[r])});
    picture.dataset.i = imageOf(r);
    line.append(picture);
    wall.append(line);
  }
  ready(wall);
  more.textContent = wall.left.length ? `Show more, ${wall.left.length.toLocaleString("en")} left` : "All are shown";
  more.disabled = !wall.left.length;
  drawPicked();
}
function drawPicked() {
  document.querySelectorAll("#list .tile").forEach(tile => {
    const image = Number(tile.dataset.i), on = picked.has(image);
    tile.classList.toggle("picked", on);
    tile.classList.toggle("moved", edits.move[data.keys[row(image)]] !== undefined);
    if (editing) tile.setAttribute("aria-pressed", on); else tile.removeAttribute("aria-pressed");
  });
  $("picked").textContent = picked.size ? count(picked.size, "picture") + " chosen" : "No picture chosen";
  $("move").disabled = !picked.size;
}
function result() {
  const groups = new Map();
  for (const id of ids) if (root(id) !== id) groups.set(root(id), [...(groups.get(root(id)) || [root(id)]), id]);
  return {
    format: "spice-pl edits 1",
    reviewed: data.review.reviewed, fingerprint: data.review.fingerprint, digest: data.review.digest,
    num_clusters: data.numClusters,
    names: edits.names, merge: [...groups.values()].map(group => group.sort((a, b) => a - b)), split: edits.split, move: edits.move,
  };
}
function numAfter() {
  const out = result();
  return data.numClusters - out.merge.reduce((sum, group) => sum + group.length - 1, 0) + Object.values(out.split).reduce((sum, parts) => sum + parts - 1, 0);
}
function command(edits) {
  return (data.review.command || "").replace("{edits}", edits).replace("{num_clusters}", numAfter());
}
function drawEdits() {
  document.querySelectorAll("[data-name]").forEach(part => part.textContent = spoken(nameOf(part.dataset.name)));
  document.querySelectorAll("[data-short]").forEach(part => part.textContent = part.dataset.short + (edits.names[part.dataset.short] ? " " + spoken(edits.names[part.dataset.short]) : ""));
  document.querySelector(".bars").classList.toggle("named", Object.keys(edits.names).length > 0);
  for (const [id, {name, merge, split, becomes}] of panels) {
    fillTargets(merge, id, "nothing");
    name.value = edits.names[id] || "";
    merge.value = edits.merge[id] ?? "";
    split.value = edits.split[id] || 1;
    split.disabled = edits.merge[id] !== undefined;
    becomes.textContent = edits.merge[id] !== undefined ? "Becomes part of " + spoken(nameOf(root(id))) + "." : edits.split[id] ? `Will be split into ${edits.split[id]} by its features, when training goes on.` : "";
  }
  fillTargets($("target"), null);
  const out = result(), parts = [];
  const named = Object.keys(out.names).filter(id => out.names[id] !== data.names[id]).length + Object.keys(data.names).filter(id => !out.names[id]).length;
  if (named) parts.push(count(named, "name"));
  if (out.merge.length) parts.push(count(out.merge.length, "merge"));
  if (Object.keys(out.split).length) parts.push(count(Object.keys(out.split).length, "split"));
  if (Object.keys(out.move).length) parts.push(count(Object.keys(out.move).length, "moved picture"));
  $("summary").textContent = parts.length ? `${parts.join(", ")}; ${data.numClusters} clusters become ${numAfter()}.` : "Nothing changed yet. Choose pictures to move them; name, merge and split clusters above their pictures.";
  $("undo").disabled = !past.length;
  $("save").disabled = !past.length;
  drawPicked();
  redraw();
}
$("move").addEventListener("click", () => change(() => {
  const target = Number($("target").value);
  for (const image of picked) { const r = row(image), key = data.keys[r]; if (target === cluster[r]) delete edits.move[key]; else edits.move[key] = target; }
  picked.clear();
}));
$("undo").addEventListener("click", () => { edits = JSON.parse(past.pop()); drawEdits(); });
$("edit").addEventListener("click", () => {
  editing = !editing;
  if (editing && !panels.size) articles.forEach(panel);
  panels.forEach(({box}) => box.hidden = !editing);
  $("bench").hidden = !editing;
  $("edit").setAttribute("aria-pressed", editing);
  $("edit").textContent = editing ? "Done" : "Name, merge, split";
  if (!editing) picked.clear();
  drawEdits();
});
function take(saved) {
  if (saved.format !== "spice-pl edits 1") throw new Error("this is not a file of edits");
  if (saved.fingerprint !== data.review.fingerprint || saved.digest !== data.review.digest) throw new Error("these edits belong to another clustering");
  const next = {names: saved.names, merge: {}, split: saved.split, move: saved.move};
  for (const [first, ...others] of saved.merge) for (const id of others) next.merge[id] = first;
  edits = next;
}
$("open").addEventListener("change", async event => {
  try { const saved = JSON.parse(await event.target.files[0].text()); change(() => take(saved)); }
  catch (error) { $("summary").textContent = "Could not open the edits: " + error.message; }
});
$("save").addEventListener("click", async () => {
  const text = JSON.stringify(result(), null, 2) + "\n";
  let where = "edits.json";
  if (data.review.save) {
    try {
      const answer = await fetch(data.review.save, {method: "POST", headers: {"Content-Type": "application/json"}, body: text});
      const said = await answer.text();
      if (!answer.ok) throw new Error(said);
      where = said;
    } catch (error) { $("summary").textContent = "Could not save: " + error.message; return; }
    $("summary").textContent = "Saved to " + where + ".";
  } else {
    const link = make("a", "", {href: URL.createObjectURL(new Blob([text], {type: "application/json"})), download: "edits.json"});
    link.click();
    $("summary").textContent = "Saved as edits.json among your downloads.";
  }
  past.length = 0;
  $("save").disabled = $("undo").disabled = true;
  $("command").textContent = command(where);
  $("next").hidden = !data.review.command;
});
if (data.review.edits) take(data.review.edits);
addEventListener("beforeunload", event => { if (past.length) event.preventDefault(); });
if (Object.keys(edits.names).length) drawEdits();
})();
