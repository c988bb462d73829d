// Teaching: a frozen frame with boxes, saved at each change; frames worth labelling; learning in the background.
import { ask, by, chosenSource } from "./page.js";

const COLOURS = ["#ff6a5c", "#56b4e9", "#f0e442", "#cc79a7", "#2fbf8f", "#e69f00", "#7aa6ff", "#d0d0d0"];
const CLICK_PX = 6, REACH_PX = 16, STEP = 0.02, POLL_MS = 1000;
const easel = by("easel"), svg = by("boxes"), nameField = by("teach-name");
let open = false, frame = null, chosen = -1, pending = null, drag = null;
let state = null, saving = Promise.resolve(), first = true, asked = null, changes = 0;

const tell = (text) => { by("teach-told").textContent = text; };
const copy = (boxes) => boxes.map((each) => ({ name: each.name, box: [...each.box] }));
const names = () => Object.keys(state?.names ?? {});
const colourOf = (name) => { const at = names().indexOf(name); return COLOURS[(at < 0 ? names().length : at) % COLOURS.length]; };
const name = () => nameField.value.trim().replace(/\s+/g, " ");

// What is asked of the server: an error becomes the one line below the name.
async function post(path, body) {
  tell("");
  try { return await ask(path, body); } catch (error) { tell(sentence(error.message)); return null; }
}
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

// The frame.
function show(found, focus = true) {
  const other = frame?.key !== found.key;
  frame = { ...found, boxes: copy(found.boxes), held: copy(found.boxes), drafts: found.drafts.filter((draft) => !found.boxes.some((each) => overlap(each.box, draft.box) > 0.5)) };
  if (other) { chosen = -1; pending = null; explain(false); }
  chosen = Math.min(chosen, frame.boxes.length - 1);
  svg.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
  by("screen").style.aspectRatio = `${frame.width} / ${frame.height}`;
  for (const id of ["easel", "teach-form", "teach-frame", "teach-live", "teach-next"]) by(id).hidden = false;
  by("teach-freeze").hidden = true;
  document.body.classList.add("frozen");
  by("teach-next").classList.toggle("main", frame.labelled);
  if (other && focus) easel.focus({ preventScroll: true });
  draw();
}

function goLive() {
  frame = pending = drag = asked = null;
  for (const id of ["easel", "teach-form", "teach-frame", "teach-live", "teach-next"]) by(id).hidden = true;
  by("teach-freeze").hidden = false;
  document.body.classList.remove("frozen");
  tell("");
}

async function freeze() {
  const found = await post("teach/freeze", { source: chosenSource() });
  if (found) show(found);
}

async function next() {
  await saving;
  await refresh();
  const key = state?.suggested.find((each) => each !== frame?.key);
  const found = await post("teach/freeze", key ? { key } : { source: chosenSource() });
  if (found) show(found);
}

async function look(key) {
  await saving;
  const found = await post("teach/freeze", { key });
  if (found) { show(found); if (matchMedia("(max-width: 640px)").matches) scrollTo({ top: 0, behavior: "instant" }); }
}

// Saved at each change. Where the server refuses, the boxes are again those that it holds. An answer counts only if nothing was changed since.
function save() {
  const key = frame.key, boxes = copy(frame.boxes), number = ++changes;
  saving = saving.then(async () => {
    const found = await post("teach/save", { key, boxes });
    if (found && frame?.key === key) frame.held = copy(found.boxes);
    if (number === changes && frame?.key === key) {
      if (found) show(found, false);
      else { frame.boxes = copy(frame.held); chosen = -1; draw(); }
    }
    await refresh();
  });
  return saving;
}

function changeBoxes(change) {
  change(frame.boxes);
  draw();
  return save();
}

function add(box) {
  if (!name()) {
    pending = box;
    tell("What is it? Type its name, and press Enter.");
    draw();
    nameField.focus({ preventScroll: true });
    return;
  }
  pending = null;
  chosen = frame.boxes.length;
  changeBoxes((boxes) => boxes.push({ name: name(), box }));
}

function accept(draft) {
  const wanted = name() || draft.name;
  if (!name()) nameField.value = wanted;
  add(draft.box);
}

function remove(index) {
  chosen = -1;
  changeBoxes((boxes) => boxes.splice(index, 1));
}

function choose(index) {
  chosen = index;
  if (index >= 0) nameField.value = frame.boxes[index].name;
  draw();
}

function overlap(a, b) {
  const wide = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), high = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (wide <= 0 || high <= 0) return 0;
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (wide * high) / (area(a) + area(b) - wide * high);
}

// Drawing.
const scale = () => Math.min(svg.clientWidth / frame.width, svg.clientHeight / frame.height) || 1;

function draw() {
  if (!frame) return;
  const parts = [];
  if (asked?.box) parts.push(shape(asked.box, "#ffb000", "", "asked"));
  for (const draft of frame.drafts) parts.push(shape(draft.box, "#ffffff", percent(draft), "draft"));
  frame.boxes.forEach((each, index) => {
    parts.push(shape(each.box, colourOf(each.name), each.name, ""));
    if (index === chosen) for (const [x, y] of corners(each.box)) parts.push(make("circle", { class: "handle", cx: x, cy: y, r: 6 / scale() }));
  });
  const fresh = drag?.kind === "new" ? drag.box : pending;
  if (fresh) parts.push(shape(fresh, "#ffffff", name(), "new"));
  svg.replaceChildren(...parts);
  listBoxes();
}

const percent = (draft) => [draft.name || "found", draft.confidence === null ? "" : `${Math.round(100 * draft.confidence)} %`].join(" ").trim();

function make(kind, attributes, text) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

function shape([x0, y0, x1, y1], colour, text, kind) {
  const group = make("g", { class: kind }), size = 14 / scale();
  const place = { x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) };
  group.append(make("rect", { ...place, class: "shade" }), make("rect", { ...place, class: "line", stroke: colour }));
  const above = place.y > 1.6 * size;
  group.append(make("text", { x: place.x + 2 / scale(), y: above ? place.y - 0.45 * size : place.y + 1.15 * size, "font-size": size, "stroke-width": 3.5 / scale() }, text));
  return group;
}

const corners = ([x0, y0, x1, y1]) => [[x0, y0], [x1, y0], [x0, y1], [x1, y1]];

function listBoxes() {
  const rows = frame.boxes.map((each, index) => row(each.name, colourOf(each.name), () => { choose(index); easel.focus({ preventScroll: true }); }, "Remove", `Remove ${each.name}`, () => remove(index), index === chosen));
  const drafts = frame.drafts.map((draft) => row(`found: ${percent(draft)}`, "#9aa3b0", () => accept(draft), "Use", `Use the box of ${percent(draft)}`, () => accept(draft), false, "draft"));
  by("teach-boxes").replaceChildren(...rows, ...drafts);
}

function row(text, colour, pick, act, label, done, isChosen, kind = "") {
  const item = document.createElement("li"), mark = document.createElement("i");
  const picked = document.createElement("button"), button = document.createElement("button");
  item.className = kind;
  item.dataset.chosen = isChosen;
  mark.style.borderColor = colour;
  picked.type = button.type = "button";
  picked.className = "pick";
  picked.textContent = text;
  picked.addEventListener("click", pick);
  button.className = "act";
  button.textContent = act;
  button.setAttribute("aria-label", label);
  button.addEventListener("click", done);
  item.append(mark, picked, button);
  return item;
}

// The hand: mouse, pen or finger.
function at(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [Math.max(0, Math.min(frame.width, point.x)), Math.max(0, Math.min(frame.height, point.y))];
}

const inside = ([x, y], [x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
const smallest = (found, boxOf) => found.sort((a, b) => area(boxOf(a)) - area(boxOf(b)))[0];
const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);

easel.addEventListener("pointerdown", (event) => {
  if (!frame || event.button > 0) return;
  event.preventDefault();
  easel.focus({ preventScroll: true });
  easel.setPointerCapture(event.pointerId);
  const point = at(event), box = frame.boxes[chosen]?.box;
  const near = ([x, y]) => Math.hypot(x - point[0], y - point[1]) * scale() < REACH_PX;
  const corner = box ? corners(box).findIndex(near) : -1;
  drag = { from: point, screen: [event.clientX, event.clientY], before: copy(frame.boxes), id: event.pointerId };
  if (corner >= 0) Object.assign(drag, { kind: "size", corner });
  else if (box && inside(point, box)) drag.kind = "move";
  else Object.assign(drag, { kind: "new", box: [...point, ...point] });
  tell("");
});

easel.addEventListener("pointermove", (event) => {
  if (!drag || event.pointerId !== drag.id) return;
  const [x, y] = at(event);
  if (drag.kind === "new") drag.box = [drag.from[0], drag.from[1], x, y];
  else {
    const box = drag.before[chosen].box;
    if (drag.kind === "size") { const changed = [...box]; changed[drag.corner % 2 ? 2 : 0] = x; changed[drag.corner > 1 ? 3 : 1] = y; frame.boxes[chosen].box = changed; }
    else frame.boxes[chosen].box = moved(box, x - drag.from[0], y - drag.from[1]);
  }
  draw();
});

function finish(event) {
  if (!drag || event.pointerId !== drag.id) return;
  const done = drag, far = Math.hypot(event.clientX - done.screen[0], event.clientY - done.screen[1]);
  drag = null;
  if (event.type === "pointercancel") { frame.boxes = done.before; draw(); return; }
  if (far < CLICK_PX) { frame.boxes = done.before; clicked(done.from); return; }
  if (done.kind === "new") { add(ordered(done.box)); return; }
  const box = ordered(frame.boxes[chosen].box);
  frame.boxes = done.before;
  changeBoxes((boxes) => { boxes[chosen].box = box; });
}
easel.addEventListener("pointerup", finish);
easel.addEventListener("pointercancel", finish);

const ordered = ([x0, y0, x1, y1]) => [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];

function clicked(point) {
  const box = smallest(frame.boxes.filter((each) => inside(point, each.box)), (each) => each.box);
  const draft = smallest(frame.drafts.filter((each) => inside(point, each.box)), (each) => each.box);
  if (asked && (box || draft)) { explain(true, (box ?? draft).box); if (box) choose(frame.boxes.indexOf(box)); return; }
  if (box) { choose(frame.boxes.indexOf(box)); return; }
  if (draft) { accept(draft); return; }
  choose(-1);
  tell("A click makes no box: drag from one corner of the object to the opposite one.");
}

function moved([x0, y0, x1, y1], x, y) {
  const dx = Math.max(-x0, Math.min(frame.width - x1, x)), dy = Math.max(-y0, Math.min(frame.height - y1, y));
  return [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
}

// The keyboard, while the frame has the focus.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
easel.addEventListener("keydown", (event) => {
  if (!frame || event.altKey || event.metaKey || (event.ctrlKey && event.key !== "z")) return;
  const arrow = ARROWS[event.key];
  if (arrow) nudge(arrow[0] * STEP * frame.width, arrow[1] * STEP * frame.height, event.shiftKey);
  else if (event.key === "Enter") { if (pending) add(pending); else add([0.35 * frame.width, 0.35 * frame.height, 0.65 * frame.width, 0.65 * frame.height]); }
  else if ((event.key === "Delete" || event.key === "Backspace") && chosen >= 0) remove(chosen);
  else if (event.key === "Escape") { if (pending || drag) { pending = drag = null; draw(); } else goLive(); }
  else if (event.key === "n") next();
  else if (event.key === "z" || event.key === "u") undo();
  else if (event.key === "0") nothing();
  else return;
  event.preventDefault();
});

function nudge(x, y, size) {
  if (chosen < 0) { if (frame.boxes.length) choose(frame.boxes.length - 1); else { tell("There is no box to move: press Enter for one."); return; } }
  const [x0, y0, x1, y1] = frame.boxes[chosen].box;
  const box = size ? [x0, y0, Math.min(frame.width, Math.max(x0 + 8, x1 + x)), Math.min(frame.height, Math.max(y0 + 8, y1 + y))] : moved([x0, y0, x1, y1], x, y);
  changeBoxes((boxes) => { boxes[chosen].box = box; });
}

by("teach-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!name()) { tell("Type what it is, such as my mug."); return; }
  if (pending) add(pending);
  else if (chosen >= 0 && frame.boxes[chosen].name !== name()) changeBoxes((boxes) => { boxes[chosen].name = name(); });
  easel.focus({ preventScroll: true });
});

function nothing() {
  if (pending) { pending = null; draw(); }
  if (frame.boxes.length) { tell("This frame has boxes: remove them first, then say that nothing is here."); return; }
  save().then(next);
}

async function undo() {
  await saving;
  pending = null;
  const found = await post("teach/undo", {});
  if (found) { show(found); chosen = -1; draw(); }
  await refresh();
}

// Why a box is what it is: the map over the picture, what speaks for it and against it, what else it could be, and the nearest labels.
async function explain(wanted, box = null) {
  const key = frame.key, ask_ = asked = wanted ? {} : null;
  by("teach-why").setAttribute("aria-pressed", String(wanted));
  by("frozen").src = `teach/${wanted ? "map" : "frame"}.jpg?key=${encodeURIComponent(key)}`;
  if (!wanted) { by("teach-reason").hidden = true; return; }
  const edges = box ? ["x0", "y0", "x1", "y1"].map((name, index) => `&${name}=${box[index]}`).join("") : "";
  let found;
  try { found = await ask(`teach/why?key=${encodeURIComponent(key)}${edges}`); } catch (error) { tell(sentence(error.message)); return; }
  if (asked !== ask_ || frame?.key !== key) return;
  asked.box = found.explanation?.box_xyxy_px ?? null;
  by("teach-reason").hidden = false;
  by("teach-words").replaceChildren(...found.words.map((text) => { const line = document.createElement("li"); line.textContent = text; return line; }));
  showReasons(found.explanation);
  thumbs("teach-nearest", found.nearest.map((each) => ({ key: each.file, label: `Nearest labelled frame: ${each.names.join(", ") || "nothing in it"}` })), "Nothing is labelled yet.");
  draw();
}

function showReasons(found) {
  const cues = found?.cues ?? [], most = Math.max(0.01, ...cues.map((each) => Math.abs(each.share)));
  by("teach-cues").hidden = !cues.length;
  by("teach-cues").tBodies[0].replaceChildren(...cues.map((each) => reasonRow(each.words, `${each.share < 0 ? "−" : "+"}${Math.abs(each.share).toFixed(1)}`, each.share / most)));
  const rivals = [...(found?.names ?? []), ...(found?.classes ?? [])];
  by("teach-rivals").hidden = !rivals.length;
  by("teach-rivals").tBodies[0].replaceChildren(...rivals.map((each) => reasonRow(each.name, `${Math.round(100 * each.probability)} %`, each.probability)));
  by("teach-input").textContent = found ? `The network saw the whole frame with ${found.input_px.join(" x ")} pixels${found.box_input_px ? `, the box with ${found.box_input_px.join(" x ")}` : ""}.` : "";
  by("teach-add").hidden = !asked.box || frame.boxes.some((each) => overlap(each.box, asked.box) > 0.5);
}

function reasonRow(text, number, share) {
  const line = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td"), bar = document.createElement("i");
  head.scope = "row";
  head.textContent = text;
  bar.style.width = `${Math.round(100 * Math.abs(share))}%`;
  bar.className = share < 0 ? "against" : "";
  cell.append(bar, number);
  line.append(head, cell);
  return line;
}

by("teach-why").addEventListener("click", () => explain(!asked));
by("teach-add").addEventListener("click", () => {
  const draft = frame.drafts.find((each) => overlap(each.box, asked.box) > 0.5);
  accept(draft ?? { name: "", box: asked.box });
  by("teach-add").hidden = true;
});
by("why-open").addEventListener("click", async () => {
  if (!open) toggle(true);
  if (!frame) await freeze();
  if (frame) explain(true);
});

// What is labelled, and what to label next.
async function refresh() {
  try { state = await ask("teach?open=true"); } catch { return; }
  by("teach-advice").textContent = state.advice;
  by("teach-folder").textContent = state.folder;
  const parts = [plural(state.images, "frame"), plural(state.boxes, "box", "boxes")];
  if (state.empty) parts.push(`${state.empty} empty`);
  by("teach-count").textContent = parts.join(" · ");
  by("teach-undo").disabled = !state.can_undo;
  by("teach-names").replaceChildren(...names().map((each) => new Option(each)));
  thumbs("teach-suggested", state.suggested.map((key) => ({ key, label: "Frame worth labelling" })), "Frames come while the picture moves.");
  thumbs("teach-labelled", state.labelled.map((each) => ({ key: each.file, mark: each.boxes || "–", label: `Labelled frame: ${each.names.join(", ") || "nothing in it"}` })), "Nothing yet.");
  showLearning();
  if (frame && !drag) draw();
}

const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

function thumbs(id, wanted, none) {
  const list = by(id), there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  list.dataset.none = none;
  const items = wanted.map(({ key, mark, label }) => {
    let item = there.get(key);
    if (!item) {
      item = document.createElement("li");
      item.dataset.key = key;
      item.innerHTML = '<button type="button"><img alt=""><b hidden></b></button>';
      item.querySelector("img").src = `teach/thumb.jpg?key=${encodeURIComponent(key)}`;
      item.firstChild.addEventListener("click", () => look(key));
    }
    item.firstChild.setAttribute("aria-label", label);
    item.firstChild.setAttribute("aria-current", String(frame?.key === key));
    item.querySelector("b").hidden = mark === undefined;
    item.querySelector("b").textContent = mark ?? "";
    return item;
  });
  if (items.length !== list.children.length || items.some((item, index) => item !== list.children[index])) list.replaceChildren(...items);
}

// Learning.
const OUTCOMES = {
  idle: () => "", running: () => "", failed: (facts) => sentence(facts.why ?? ""),
  worse: () => "It got worse on your frames, so the old head stays. More boxes, and boxes that fit closely, help.",
  done: (facts) => `It has learnt from ${plural(facts.boxes, "box", "boxes")} in ${Math.round(facts.took_s)} s.`,
};

function showLearning() {
  const facts = state.learning, running = facts?.state === "running";
  by("teach-learn").disabled = !facts || running;
  by("teach-learn").classList.toggle("main", state.boxes >= state.fewest && facts?.state !== "done");
  by("teach-learn").textContent = state.boxes ? `Learn from ${plural(state.boxes, "box", "boxes")}` : "Learn";
  by("teach-stop").hidden = by("teach-progress").hidden = !running;
  if (!facts) { by("teach-outcome").textContent = sentence(`This run cannot learn: ${state.why_not}`); return; }
  by("teach-share").value = facts.share;
  by("teach-stage").textContent = running ? `${Math.round(100 * facts.share)} % · ${facts.stage}` : "";
  by("teach-outcome").textContent = OUTCOMES[facts.state](facts);
  showFigures(facts);
  by("teach-all-the-same").hidden = facts.state !== "worse";
  by("teach-which").hidden = by("teach-keep").hidden = !facts.has_taught;
  for (const each of document.querySelectorAll("input[name=which]")) each.checked = (each.value === "taught") === facts.uses_taught;
  by("teach-kept").hidden = !facts.kept;
  if (facts.kept && by("teach-kept").dataset.name !== facts.kept) {
    const line = document.createElement("code");
    line.textContent = `sightline stream 0 --head ${/\s/.test(facts.kept) ? `'${facts.kept}'` : facts.kept}`;
    by("teach-kept").replaceChildren("Kept. Later, in the same folder:", line);
    by("teach-kept").dataset.name = facts.kept;
  }
}

// What more boxes would bring, and how it went from one time to the next.
function showCourse(course, more) {
  by("teach-course").hidden = !more && course.length < 2;
  const points = course.map((each) => `${each.mean_iou.toFixed(2)} with ${plural(each.boxes, "box", "boxes")}`).join(", ");
  by("teach-course").textContent = [more && sentence(more), course.length > 1 && `Mean overlap so far: ${points}.`].filter(Boolean).join(" ");
}

function showFigures({ before, after, course = [], more = "" }) {
  by("teach-figures").hidden = !after;
  showCourse(after ? course : [], after ? more : "");
  if (!after) return;
  const lines = [["Right boxes", "corloc", (x) => `${Math.round(100 * x)} %`], ["Mean overlap", "mean_iou", (x) => x.toFixed(2)], ["Objects among 10 boxes", "recall_at_10", (x) => `${Math.round(100 * x)} %`]];
  by("teach-figures").tBodies[0].replaceChildren(...lines.filter(([, key]) => key === "recall_at_10" || after.images_with_one_object).map(([title, key, words]) => {
    const line = document.createElement("tr"), head = document.createElement("th"), old = document.createElement("td"), now = document.createElement("td");
    head.scope = "row";
    head.textContent = title;
    old.textContent = before ? words(before[key]) : "–";
    now.textContent = words(after[key]);
    if (before) now.className = after[key] > before[key] + 0.005 ? "up" : after[key] < before[key] - 0.005 ? "down" : "";
    line.append(head, old, now);
    return line;
  }));
}

async function act(path, body) { if (await post(path, body)) tell(""); await refresh(); }
by("teach-learn").addEventListener("click", async () => { await saving; act("teach/learn", {}); });
by("teach-stop").addEventListener("click", () => act("teach/stop", {}));
by("teach-all-the-same").addEventListener("click", () => act("teach/learn", { even_if_worse: true }));
for (const each of document.querySelectorAll("input[name=which]")) each.addEventListener("change", () => act("teach/use", { taught: each.value === "taught" }));
by("teach-keep").addEventListener("submit", (event) => { event.preventDefault(); act("teach/keep", { name: by("teach-head").value }); });

by("teach-freeze").addEventListener("click", freeze);
by("teach-next").addEventListener("click", next);
by("teach-live").addEventListener("click", goLive);
by("teach-empty").addEventListener("click", nothing);
by("teach-undo").addEventListener("click", undo);
addEventListener("resize", draw);

function toggle(wanted) {
  open = wanted;
  document.body.classList.toggle("teaching", open);
  by("teach").hidden = !open;
  by("teach-open").setAttribute("aria-expanded", String(open));
  if (open) keepAsking(); else goLive();
}
by("teach-open").addEventListener("click", () => toggle(!open));
by("teach-close").addEventListener("click", () => { toggle(false); by("teach-open").focus(); });

let asking = false;
async function keepAsking() {
  if (asking) return;
  asking = true;
  while (open) { await refresh(); await new Promise((done) => setTimeout(done, POLL_MS)); }
  asking = false;
}

document.addEventListener("state", ({ detail }) => {
  by("teach-open").hidden = by("why-open").hidden = detail.teaches === null;
  if (first && detail.teaches === "first") toggle(true);
  first = false;
});
