// The page: pictures by one request after the other (so that a slow line sees fewer of them, never old ones), figures once a second.
import { drawChart, LINE_COLOURS, STAGE_COLOURS } from "./charts.js";

export const by = (id) => document.getElementById(id);
const STATE_EVERY_MS = 1000, HISTORY = 120, IN_FLIGHT = 2, STALE_MS = 4000, SAID_EVERY_MS = 250, ANSWER_MS = 5000, PICTURE_MS = 8000;
let source = null, state = null, touched_ms = -Infinity, shownNumber = 0, shownAt_ms = -Infinity;
let lost = ""; // why nothing is heard of the run; empty while it answers
let chosenAt_ms = performance.now(), lastSeen = "", labels = null, saidAt_ms = 0; // labels: of the shown picture
let changing = 0, changes = 0; // on their way; answered
let clickShown = 0;
export const chosenSource = () => source;
const history = { times_s: [], stages: [], rates: [] };

export async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS), ...options });
  const answer = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(answer.error ?? "this value is not possible"), { status: reply.status });
  return answer;
}

// Pictures. Two requests are out at once: while one picture travels, the next is waited for.
async function watch() {
  while (true) {
    if (source === null || document.hidden) { await pause(200); continue; }
    const wanted = source;
    try {
      const reply = await fetch(`frame.jpg?source=${encodeURIComponent(wanted)}&after=${shownNumber}`, { cache: "no-store", signal: AbortSignal.timeout(PICTURE_MS) });
      if (reply.status === 200) await show(wanted, Number(reply.headers.get("X-Number")), JSON.parse(reply.headers.get("X-Seen")), await reply.blob());
      else await pause(reply.status === 204 ? 50 : 1000);
    } catch { await pause(1000); }
  }
}

async function show(from, number, seen, blob) {
  if (from !== source || number === shownNumber) return;
  const older = number < shownNumber && number > shownNumber - 1000; // far below: a new run began
  if (older) return;
  shownNumber = number;
  const image = await createImageBitmap(blob), canvas = by("picture");
  if (from !== source || number < shownNumber) return;
  if (canvas.width !== image.width || canvas.height !== image.height) {
    canvas.width = image.width;
    canvas.height = image.height;
    by("screen").style.aspectRatio = `${image.width} / ${image.height}`;
  }
  canvas.getContext("2d").drawImage(image, 0, 0);
  image.close();
  canvas.dataset.number = number;
  shownAt_ms = performance.now();
  labels = seen;
  if (state && (document.body.classList.contains("dead") || shownAt_ms - saidAt_ms > SAID_EVERY_MS)) showHealth();
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Figures.
async function keepAsking() {
  while (true) {
    try {
      const before = changes, found = await ask("state"), stale = changing || changes !== before;
      take(stale ? { ...found, settings: state.settings } : found, !stale); // settings from before what a hand has just changed
      remember();
    } catch (error) { lose(error); }
    drawCharts();
    await pause(STATE_EVERY_MS);
  }
}

// Nothing is heard of the run: the server has ended, or the line to it is gone.
function lose(error) {
  if (error.status === 401) lost = "This page is no longer let in. Open the address that was printed when the stream began.";
  else if (error.status) lost = `The stream answers with an error: ${error.message}`;
  else lost = "No connection to Sightline: it has ended, or the network is gone.";
  for (const id of ["fps", "age", "tail", "dropped", "reconnects"]) by(id).textContent = "–";
  for (const rate of document.querySelectorAll("#cameras .rate")) rate.textContent = "";
  showHealth();
}

const chosenState = () => state?.sources.find(({ name }) => name === source) ?? {};

// Why the shown picture is not of now; empty while pictures come.
function whyDead() {
  if (lost) return lost;
  const { state: how, trouble } = chosenState(), silent_ms = performance.now() - Math.max(shownAt_ms, chosenAt_ms);
  if (how === "ended") return "The source has ended.";
  if (how === "failed" || how === "waiting") return trouble || "The camera gives no pictures.";
  return silent_ms > STALE_MS ? `No picture for ${Math.round(silent_ms / 1000)} seconds.` : "";
}

// What is dead looks dead: the picture is grey, nothing says live, and nothing is recorded.
function showHealth() {
  const why = whyDead(), isThere = shownAt_ms > 0, body = document.body.classList;
  body.toggle("lost", lost !== "");
  if (body.contains("dead") !== (why !== "" && isThere)) document.dispatchEvent(new CustomEvent("health", { detail: !body.toggle("dead") }));
  for (const part of document.querySelectorAll(".controls, .bar, .teach")) part.inert = lost !== "";
  by("link").dataset.state = lost ? "lost" : why || !isThere ? "waiting" : "live";
  by("link").textContent = lost ? "no connection" : why ? "no picture" : isThere ? "live" : "waiting";
  by("nothing").hidden = why === "" && isThere;
  by("nothing").textContent = why || "Waiting for a picture …";
  by("recording-mark").hidden = why !== "" || !isRecorded();
  const now = labels?.join("  ·  ") || (labels && state.limits ? "nothing sure in view" : "");
  saidAt_ms = performance.now();
  if (!why && isThere && now) lastSeen = `Last seen at ${new Date().toLocaleTimeString([], { hourCycle: "h23" })}: ${now}`;
  by("seen").textContent = why ? lastSeen : now;
  by("picture").setAttribute("aria-label", why || !isThere ? `${source ?? "Camera"}: ${by("nothing").textContent} ${lastSeen}`.trim() : `Live picture of ${source}: ${now.replaceAll("  ·  ", ", ") || "no box"}`);
}

const isRecorded = () => state?.recordings.some((each) => each.on && each.source === source);

function take(found, settled = true) {
  state = found;
  lost = "";
  document.body.classList.add("known");
  const names = state.sources.map(({ name }) => name);
  if (!names.includes(source)) choose(names.includes(cameraInAddress()) ? cameraInAddress() : names[0] ?? null);
  by("engine").textContent = state.title;
  const chosen = chosenState();
  const figure = (id, value, digits = 0) => { by(id).textContent = value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }); };
  figure("fps", chosen.fps, 1);
  figure("age", chosen.age_ms?.p50, 1);
  figure("tail", chosen.age_ms?.p99, 1);
  figure("dropped", chosen.dropped);
  figure("reconnects", chosen.reconnects);
  by("dropped").parentElement.title = Object.entries(chosen.causes ?? {}).map(([cause, count]) => `${count}: ${cause}`).join("\n");
  by("screen").classList.toggle("follows", state.follows);
  by("hint").hidden = !state.follows || document.body.classList.contains("teaching");
  document.dispatchEvent(new CustomEvent("state", { detail: state }));
  listCameras();
  if (settled) takeSettings();
  showHealth();
}

function listCameras() {
  const list = by("cameras");
  while (list.children.length > state.sources.length) list.lastChild.remove();
  state.sources.forEach((each, index) => {
    let item = list.children[index];
    if (!item) {
      item = document.createElement("li");
      item.innerHTML = '<button type="button"><i class="state"></i><span class="name"></span><span class="rate"></span><span class="about"></span></button>';
      item.firstChild.addEventListener("click", () => choose(item.dataset.name));
      list.append(item);
    }
    item.dataset.name = each.name;
    const part = (name) => item.querySelector(`.${name}`);
    part("state").dataset.state = each.state;
    part("name").textContent = each.name;
    part("rate").textContent = each.fps === undefined ? "" : `${each.fps.toFixed(1)} fps`;
    const drops = each.dropped ? ` · ${each.dropped} dropped` : "", back = each.reconnects ? ` · back ${each.reconnects}×` : "";
    const size = each.width_px ? `${each.width_px} × ${each.height_px}` : each.state;
    const objects = (each.state === "live" ? each.objects ?? [] : []).filter((one) => one.x0 !== null).map((one) => `${one.track_id} ${one.class_name} ${Math.round(100 * one.confidence)} %`);
    part("about").textContent = each.trouble || `${size}${drops}${back}`;
    part("about").title = objects.join("\n");
    if (objects.length && !each.trouble) part("about").textContent += ` · follows ${objects.map((one) => one.split(" ")[0]).join(", ")}`;
    part("about").classList.toggle("trouble", Boolean(each.trouble));
    item.firstChild.setAttribute("aria-current", String(each.name === source));
  });
}

// The address keeps the camera: it is shown again after a reload, and a link leads to it.
function cameraInAddress() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}

function choose(name) {
  if (name === source) return;
  if (source !== null) window.history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  source = name;
  shownNumber = 0;
  shownAt_ms = -Infinity;
  chosenAt_ms = performance.now();
  lastSeen = "";
  labels = null;
  history.times_s.length = history.stages.length = 0;
  history.rates.length = 0;
  by("picture").getContext("2d").clearRect(0, 0, by("picture").width, by("picture").height); // the other camera's is not this one's
  if (state) take(state);
}

function takeSettings() {
  const { settings } = state;
  by("record").setAttribute("aria-pressed", String(state.recording));
  by("record").querySelector("span").textContent = state.recording ? "Stop" : "Record";
  by("record-which").hidden = state.sources.length < 2;
  by("record-which").disabled = state.recording;
  by("where").textContent = state.trouble || (settings.wanted_class ? `looking for ${settings.wanted_class}` : "");
  listRecordings();
  if (performance.now() - touched_ms < 1500) return; // what a hand is moving is not pulled from under it
  if (document.activeElement !== by("class")) by("class").value = settings.wanted_class ?? "";
  for (const control of lookControls) showLook(control, settings[control.dataset.look]);
  by("alpha").parentElement.classList.toggle("idle", settings.heat_map !== "over");
  showLeast(settings.min_score);
}

// The files of recordings, the newest first; each plays and is downloaded once it is not written any more.
function listRecordings() {
  const files = state.recordings.toReversed(), now = JSON.stringify(files);
  if (by("recordings").dataset.of === now) return; // a link that is under a finger stays
  by("recordings").dataset.of = now;
  by("recorded").hidden = files.length === 0;
  by("recordings").replaceChildren(...files.map(({ name, on, link }) => {
    const item = document.createElement("li"), title = document.createElement("span");
    title.textContent = name;
    title.className = "name";
    item.append(title);
    if (on || !link) item.append(Object.assign(document.createElement("span"), { className: "quiet", textContent: on ? "recording" : "recorded" }));
    else {
      const play = Object.assign(document.createElement("button"), { type: "button", textContent: "Play" });
      play.setAttribute("aria-label", `Play ${name}`);
      play.addEventListener("click", () => playRecording(name, link));
      const save = Object.assign(document.createElement("a"), { href: link, download: name, className: "button", textContent: "Download" });
      save.setAttribute("aria-label", `Download ${name}`);
      item.append(play, save);
    }
    return item;
  }));
}

function playRecording(name, link) {
  by("player-name").textContent = name;
  by("player-video").src = link;
  by("player").showModal();
  by("player-video").play().catch(() => {}); // where a browser plays nothing unasked, its own button does
}

function remember() {
  const chosen = state.sources.find(({ name }) => name === source);
  history.times_s.push(performance.now() / 1000);
  history.stages.push(Object.fromEntries(Object.entries(chosen?.stages_ms ?? {}).map(([stage, times]) => [stage, times.p50])));
  history.rates.push(Object.fromEntries(state.sources.map(({ name, fps }) => [name, fps ?? null])));
  for (const list of Object.values(history)) if (list.length > HISTORY) list.shift();
}

function drawCharts() {
  const stages = Object.keys(STAGE_COLOURS).filter((stage) => history.stages.some((entry) => stage in entry));
  const areas = stages.map((name) => ({ name, colour: STAGE_COLOURS[name], values: history.stages.map((entry) => entry[name] ?? null) }));
  drawChart(by("stages"), history.times_s, areas, { stacked: true });
  legend("stage-legend", areas, 2);
  const names = (state?.sources ?? []).map(({ name }) => name);
  const lines = names.map((name, i) => ({ name, colour: LINE_COLOURS[i % LINE_COLOURS.length], values: history.rates.map((entry) => entry[name] ?? null) }));
  drawChart(by("rates"), history.times_s, lines, { stacked: false });
  legend("rate-legend", lines, 1);
  by("stages").dataset.points = history.times_s.length;
}

function legend(id, series, digits) {
  by(id).replaceChildren(...series.map(({ name, colour, values }) => {
    const item = document.createElement("li"), mark = document.createElement("i"), value = document.createElement("b");
    mark.style.background = colour;
    value.textContent = values.at(-1)?.toFixed(digits) ?? "–";
    item.append(mark, name, value);
    return item;
  }));
}

// Steering.
async function change(path, body) {
  let done = true;
  changing++;
  by("told").textContent = "";
  try {
    const found = await ask(path, body);
    if (changing === 1) take(found);
  } catch (error) { by("told").textContent = error.message; done = false; }
  changing--;
  changes++;
  return done;
}

// Where in the picture a hand points, in shares of its sides; null beside it, where the picture does not fill its frame.
function pointAt(event) {
  const { width, height } = by("picture"), frame = by("picture").getBoundingClientRect();
  const scale = Math.min(frame.width / width, frame.height / height);
  const share = (at, middle, length) => (at - middle) / (length * scale) + 0.5;
  const point = [share(event.clientX, frame.left + frame.width / 2, width), share(event.clientY, frame.top + frame.height / 2, height)];
  return point.every((each) => each >= 0 && each <= 1) ? point : null;
}

function markClick(event) {
  const mark = by("click-mark"), screen = by("screen").getBoundingClientRect();
  mark.hidden = true;
  mark.style.left = `${event.clientX - screen.left}px`;
  mark.style.top = `${event.clientY - screen.top}px`;
  mark.getBoundingClientRect(); // so that the animation begins anew
  mark.hidden = false;
}

const hint = (text) => { by("hint").lastChild.textContent = text; };

// The look: each input with data-look="NAME" shows and changes the setting NAME (a field of Look in annotate.py).
const lookControls = [...document.querySelectorAll("[data-look]")];

function showLook(control, value) {
  if (control.type === "checkbox") control.checked = value;
  else if (control.type === "radio") control.checked = control.value === value;
  else { control.value = value; label(control); }
}

const percent = (share) => `${Math.round(share * 100)} %`;

// From which confidence on boxes are shown; null is the head's own limit.
function showLeast(least) {
  const { limits } = state, slider = by("least");
  slider.value = least ?? limits?.shown_from ?? 0;
  slider.disabled = limits === null;
  slider.parentElement.classList.toggle("idle", limits === null);
  by("least-default").hidden = limits === null || least === null;
  label(slider);
  by("meaning").textContent = limits === null
    ? "Nothing tells how sure these boxes are. All are shown, with the score of the class."
    : `The number beside a box says how sure the box is: of 100 boxes that say 93 %, about 93 are right. Dashed boxes are unsure: they say less than ${percent(limits.sure_from)}. The default shows boxes from ${percent(limits.shown_from)} on.`;
}

const label = (range) => { by(`${range.id}-value`).textContent = percent(range.value); };

by("look").addEventListener("submit", (event) => { event.preventDefault(); by("class").blur(); change("settings", { wanted_class: by("class").value }); });
by("likeliest").addEventListener("click", () => { by("class").value = ""; change("settings", { wanted_class: "" }); });
for (const control of lookControls) {
  const name = control.dataset.look;
  if (control.type === "range") { steer(control, name); continue; }
  const value = () => (control.type === "checkbox" ? control.checked : control.value);
  control.addEventListener("change", () => { touched_ms = 0; change("settings", { [name]: value() }); });
}
steer(by("least"), "min_score");
by("least-default").addEventListener("click", () => { touched_ms = 0; change("settings", { min_score: "default" }); });

// Sends what a hand moves a range to: one request at once, and the last value in the end.
function steer(range, name) {
  let sending = false, again = false;
  const send = async () => {
    if (sending) { again = true; return; }
    sending = true;
    do { again = false; await change("settings", { [name]: Number(range.value) }); } while (again);
    sending = false;
  };
  range.addEventListener("input", () => { touched_ms = performance.now(); label(range); send(); });
}
by("picture").addEventListener("click", async (event) => {
  const point = pointAt(event);
  if (!state?.follows || point === null) return;
  markClick(event);
  if (await change("settings", { source, point })) hint("Following what you clicked");
  clearTimeout(clickShown);
  clickShown = setTimeout(() => { by("click-mark").hidden = true; hint("Click on what to follow"); }, 2500);
});
by("record").addEventListener("click", () => change("recording", { on: !state.recording, source: by("record-which").value === "all" ? null : source }));
by("player").addEventListener("close", () => { by("player-video").pause(); by("player-video").removeAttribute("src"); });
for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
by("snapshot").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = `snapshot.jpg?source=${encodeURIComponent(source)}`;
  link.download = `${source}-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.jpg`;
  link.click();
});
by("full").addEventListener("click", () => (document.fullscreenElement ? document.exitFullscreen() : document.querySelector(".stage").requestFullscreen()));
if (!document.fullscreenEnabled) by("full").hidden = true;
window.addEventListener("resize", drawCharts);
window.addEventListener("hashchange", () => { if (state?.sources.some(({ name }) => name === cameraInAddress())) choose(cameraInAddress()); });

ask("classes").then((names) => by("classes").replaceChildren(...names.map((name) => new Option(name))), () => {});
keepAsking();
for (let i = 0; i < IN_FLIGHT; i++) watch();
