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

// Walls: each is one stop of the tab key, the arrow keys move within
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
  const where = listed ? ` (among the ${listed.length.toLocaleString("en")} images on this page)` : "";
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
