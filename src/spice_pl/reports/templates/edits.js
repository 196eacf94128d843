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
  for (const [text, proposed] of [["Use folder name", article.dataset.folder], ["Use suggested name", article.dataset.word]]) {
    if (!proposed) continue;
    const use = make("button", text, {type: "button", title: spoken(proposed)});
    use.addEventListener("click", () => change(() => { edits.names[id] = proposed; }));
    box.append(use);
  }
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
  more.textContent = wall.left.length ? `Show more (${wall.left.length.toLocaleString("en")} left)` : "All images are shown";
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
  $("move").disabled = !picked.size || $("target").value === "";
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
    fillTargets(merge, id, "none");
    name.value = edits.names[id] || "";
    merge.value = edits.merge[id] ?? "";
    split.value = edits.split[id] || 1;
    split.disabled = edits.merge[id] !== undefined;
    becomes.textContent = edits.merge[id] !== undefined ? "Becomes part of " + spoken(nameOf(root(id))) + "." : edits.split[id] ? `Will be split into ${edits.split[id]} clusters by its features.` : "";
  }
  fillTargets($("target"), null, "choose");
  const out = result(), parts = [];
  const named = Object.keys(out.names).filter(id => out.names[id] !== data.names[id]).length + Object.keys(data.names).filter(id => !out.names[id]).length;
  if (named) parts.push(count(named, "name"));
  if (out.merge.length) parts.push(count(out.merge.length, "merge"));
  if (Object.keys(out.split).length) parts.push(count(Object.keys(out.split).length, "split"));
  if (Object.keys(out.move).length) parts.push(count(Object.keys(out.move).length, "moved picture"));
  $("summary").textContent = parts.length ? `${parts.join(", ")}; ${numAfter() === data.numClusters ? `there are still ${numAfter()} clusters` : `${data.numClusters} clusters become ${numAfter()}`}.` : "Nothing changed yet. Click pictures to choose those to move. Name, merge or split a cluster in the fields above its pictures.";
  $("undo").disabled = !past.length;
  $("save").disabled = !past.length;
  drawPicked();
  redraw();
}
$("target").addEventListener("change", drawPicked);
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
$("edit-first").addEventListener("click", () => {
  if (!editing) $("edit").click();
  articles[0]?.scrollIntoView();
  const name = panels.get(Number(articles[0]?.dataset.id))?.name;
  name?.focus({preventScroll: true});
  name?.select();
});
function take(saved) {
  if (saved.format !== "spice-pl edits 1") throw new Error("this file does not hold edits");
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
  let where = "edits.json", made = "";
  if (data.review.save) {
    try {
      $("summary").textContent = "Saving …";
      const version = data.review.version === undefined ? {} : {"X-Edits-Version": data.review.version};
      const answer = await fetch(data.review.save, {method: "POST", headers: {"Content-Type": "application/json", ...version}, body: text});
      const said = await answer.text();
      if (!answer.ok) throw new Error(said);
      [where, made, data.review.version] = said.split("\n");
    } catch (error) { $("summary").textContent = "Could not save: " + error.message; return; }
    $("summary").textContent = "Saved to " + where + "." + (made ? " The new clusters are in " + made + ", with clusters.csv and model.spice." : "");
  } else {
    const link = make("a", "", {href: URL.createObjectURL(new Blob([text], {type: "application/json"})), download: "edits.json"});
    link.click();
    $("summary").textContent = "Saved as edits.json in your downloads.";
  }
  past.length = 0;
  $("save").disabled = $("undo").disabled = true;
  $("command").textContent = command(where);
  $("next").hidden = !data.review.command;
});
if (data.review.edits) take(data.review.edits);
addEventListener("beforeunload", event => { if (past.length) event.preventDefault(); });
if (Object.keys(edits.names).length) drawEdits();
