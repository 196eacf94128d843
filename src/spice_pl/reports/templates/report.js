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

// The edits so far, and those before each change, for undo.
let edits = {names: {...data.names}, merge: {}, split: {}, move: {}};
const past = [];
const nameOf = id => edits.names[id] || "Cluster " + id;
const root = id => { while (edits.merge[id] !== undefined) id = edits.merge[id]; return id; };
const truthOf = r => label && label[r] >= 0 ? data.classes[label[r]] : null;

// Pictures: from the walls, or else from the sheet of the map
const pictured = column(data.pictured, Uint32Array), near = column(data.near, Uint16Array);
const placeOf = new Map();
if (pictured) pictured.forEach((r, at) => placeOf.set(r, at));
const pointOf = new Map();
if (data.map) column(data.map.row, Uint32Array).forEach((r, at) => pointOf.set(r, at));
function piece(tag, point, side, more) {
  const made = make(tag, undefined, {className: "piece", ...more}), {tile, perRow, atlas} = data.map, scale = side / tile;
  made.style.width = made.style.height = side + "px";
  made.style.backgroundImage = `url(${atlas})`;
  made.style.backgroundSize = perRow * side + "px auto";
  made.style.backgroundPosition = `${-(point % perRow) * tile * scale}px ${-Math.floor(point / perRow) * tile * scale}px`;
  return made;
}
const tileOf = image => document.querySelector(`main .tile[data-i="${image}"]`);
function pictureOf(r, side, tag, more) {
  const tile = tileOf(imageOf(r));
  if (!tile) return pointOf.has(r) ? piece(tag, pointOf.get(r), side, more) : make(tag, "–", more);
  const made = make(tag, undefined, {className: [...tile.classList].filter(name => /^(tile|s\d+)$/.test(name)).join(" ") + " square piece", ...more});
  made.style.cssText = tile.style.cssText;
  made.style.setProperty("--tile", side + "px");
  return made;
}
// A byte of a file name that is not text is a lone surrogate from U+DC80; an address holds the byte.
const quoted = text => [...text].map(c => c === "/" ? c : /[\udc80-\udcff]/.test(c) ? "%" + (c.codePointAt(0) - 0xdc00).toString(16).toUpperCase() : encodeURIComponent(c.isWellFormed?.() === false ? "\ufffd" : c)).join("");
function addressOf(r) {
  const key = data.keys[r];
  if (!data.originals || data.review.image || key.startsWith("//") || key.includes("\\") || /^[A-Za-z]:/.test(key)) return "";
  return key.startsWith("/") ? "file://" + quoted(key) : data.originals + quoted(key);
}

// One picture, large, with its nearest images
const dialog = $("one");
const showOne = tile => showImage(row(Number(tile.dataset.i)), tile);
function showImage(r, tile) {
  const image = imageOf(r), big = dialog.querySelector(".big"), address = addressOf(r);
  tile = tile || tileOf(image);
  let picture;
  if (data.review.image) picture = make("img", undefined, {src: data.review.image + image, alt: ""});
  else if (tile && !tile.src) {
    picture = make("span", undefined, {className: [...tile.classList].filter(name => name !== "picked" && name !== "moved").join(" ")});
    picture.style.cssText = tile.style.cssText;
    const wide = Number(tile.style.getPropertyValue("--w")) || 1, room = Math.min(innerWidth * .92 - 48, 430);
    picture.style.setProperty("--tile", Math.floor(Math.min(320, room / wide, innerHeight * .5) / 8) * 8 + "px");
    if (tile.dataset.look) picture.dataset.look = tile.dataset.look;
  } else picture = pointOf.has(r) ? piece("span", pointOf.get(r), 256) : make("span");
  big.classList.toggle("looking", !!(lookAt?.checked && tile?.dataset.look));
  const link = address ? make("a", undefined, {href: address, target: "_blank", rel: "noreferrer", title: "Open the original"}) : null;
  if (link) link.append(picture);
  big.replaceChildren(link || picture);
  const title = $("one-title");
  title.replaceChildren(address ? make("a", spoken(data.keys[r]), {href: address, target: "_blank", rel: "noreferrer"}) : spoken(data.keys[r]));
  const list = dialog.querySelector("dl");
  list.replaceChildren();
  const facts = [["Cluster", nameOf(cluster[r])], ["Confidence", share(confidence[r])], ["Agreement", share(agreement[r])], ["Reliable", flags[r] & 1 ? "yes" : "no"]];
  if (tile?.dataset.look) facts.push(["Looks at", tile.dataset.look]);
  if (truthOf(r) !== null) facts.push(["Truth", truthOf(r)]);
  for (const [name, value] of facts) { const line = make("div"); line.append(make("dt", name), make("dd", spoken(value))); list.append(line); }
  const place = placeOf.get(r), box = dialog.querySelector(".near"), others = box.querySelector(".row");
  box.hidden = place === undefined || !data.numNear;
  others.replaceChildren();
  if (!box.hidden) for (let k = 0; k < data.numNear; k++) {
    const other = pictured[near[place * data.numNear + k]], said = `${spoken(data.keys[other])} · ${nameOf(cluster[other])}`;
    const button = pictureOf(other, 48, "button", {type: "button", title: said});
    button.setAttribute("aria-label", said);
    button.addEventListener("click", () => { showImage(other); others.firstChild?.focus(); });
    others.append(button);
  }
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

// Where the network looks, over the prototypes
const lookAt = $("look");
lookAt?.addEventListener("change", () => $("list").classList.toggle("looking", lookAt.checked));

// Walls: each is one stop of the tab key, the arrow keys move within
const walls = [...document.querySelectorAll(".cluster .wall, #odd .wall")];
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
for (const part of [$("list"), $("odd")]) part?.addEventListener("click", event => { const tile = event.target.closest(".tile"); if (tile) press(tile); });
for (const part of [$("list"), $("odd")]) part?.addEventListener("keydown", event => {
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
let articles = [...document.querySelectorAll(".cluster")];
const STEP = document.body.classList.contains("many") ? 12 : 30, wanted = new Set();  // shown at first and more at each press; asked for
let limit = STEP;
const lower = data.keys.map(key => key.toLowerCase());
function search() {
  const query = $("find").value.trim().toLowerCase(), only = passes[$("only").value];
  document.querySelectorAll("#list .tile").forEach(tile => tile.parentElement.hidden = !only(row(Number(tile.dataset.i))));
  walls.filter(wall => wall.closest(".cluster")).forEach(wall => {
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
    shown += match;
    article.hidden = !match || (shown > limit && !wanted.has(article));
  }
  $("more").hidden = shown <= limit;
  $("more").textContent = `Show more clusters (${(shown - limit).toLocaleString("en")} left)`;
  for (const r of query ? hits.slice(0, 50) : []) {
    const line = make("li"), link = make("a", nameOf(cluster[r]), {href: "#cluster-" + cluster[r]});
    line.append(make("b", spoken(data.keys[r])), link, make("span", "confidence " + share(confidence[r])));
    found.append(line);
  }
  found.hidden = !query || !hits.length;
  const where = listed ? ` (among the ${listed.length.toLocaleString("en")} images on this page)` : "";
  $("status").textContent = query
    ? `${count(shown, "cluster")}, ${count(hits.length, "file")}${where}${hits.length > 50 ? "; the first 50 are listed" : ""}`
    : "";
}
let waiting;
$("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
$("only").addEventListener("change", search);
$("more").addEventListener("click", () => { limit += STEP; search(); });
function reveal(id) {
  const article = $("cluster-" + id);
  if (!article || !article.hidden) return;
  wanted.add(article);
  search();
}
const target = hash => /^#cluster-(\d+)$/.exec(hash)?.[1];
document.addEventListener("click", event => { const id = target(event.target.closest("a")?.hash || ""); if (id !== undefined) reveal(id); });
addEventListener("hashchange", () => { const id = target(location.hash); if (id !== undefined) { reveal(id); $("cluster-" + id)?.scrollIntoView(); } });
const orders = [...document.querySelectorAll(".order")];
function order(event) {
  const how = event.target.value, by = {id: a => +a.dataset.id, large: a => -a.dataset.size, small: a => +a.dataset.size, doubt: a => -a.dataset.doubt}[how];
  orders.forEach(select => select.value = how);
  articles.sort((a, b) => by(a) - by(b) || a.dataset.id - b.dataset.id);
  $("list").append(...articles);
  for (const list of document.querySelectorAll(".glance, .bars")) {
    const lines = new Map([...list.children].map(line => [line.dataset.id, line]));
    list.append(...articles.map(article => lines.get(article.dataset.id)));
  }
  search();
}
orders.forEach(select => select.addEventListener("change", order));
search();
if (target(location.hash) !== undefined) { reveal(target(location.hash)); $("cluster-" + target(location.hash))?.scrollIntoView(); }

// The table of all images. A spreadsheet would run a cell that begins like a formula.
for (const button of document.querySelectorAll(".csv")) {
  button.hidden = !!listed;
  button.addEventListener("click", saveTable);
}
function saveTable() {
  const cell = text => { const safe = /^[=+\-@\t\r]/.test(text) ? "'" + text : text; return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe; };
  const lines = [["image", "cluster", "name", "confidence", "agreement", "reliable", "not sure"]];
  data.keys.forEach((key, r) => lines.push([spoken(key), cluster[r], nameOf(cluster[r]), share(confidence[r]), share(agreement[r]), flags[r] & 1, flags[r] >> 1 & 1]));
  const text = lines.map(line => line.map(value => cell(String(value))).join(",")).join("\r\n") + "\r\n";
  make("a", "", {href: URL.createObjectURL(new Blob([text], {type: "text/csv"})), download: "clusters.csv"}).click();
}

// Other numbers of clusters
for (const button of document.querySelectorAll(".preview")) button.addEventListener("click", () => {
  const box = $("preview"), on = button.getAttribute("aria-pressed") === "true", preview = data.previews[button.dataset.at];
  document.querySelectorAll(".preview").forEach(each => each.setAttribute("aria-pressed", each === button && !on));
  box.hidden = on;
  if (on) return;
  const list = make("ul"), left = preview.num_clusters - preview.groups.length;
  list.setAttribute("role", "list");
  for (const [size, points] of preview.groups) {
    const line = make("li"), pictures = make("div", undefined, {className: "three"});
    for (const point of points) pictures.append(piece("span", point, 52, {title: spoken(data.keys[rows[point]])}));
    line.append(make("p", count(size, "image")), pictures);
    list.append(line);
  }
  const says = `${preview.num_clusters} clusters, a preview by k-means` + (left ? `; the ${preview.groups.length} largest are shown` : "");
  const copy = make("button", "Copy", {type: "button"}), command = make("code", preview.command), line = make("p", "To make them a result: ");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(preview.command).then(() => copy.textContent = "Copied"));
  line.append(command, " ", copy);
  box.replaceChildren(make("h3", says), list, line);
});
