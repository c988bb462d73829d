// What came into view: a tile for each event, bars over time, and the picture of an event, large.
import { ask, by, chosenSource } from "./page.js";

const MOST_LANES = 5, SHORTEST_S = 20, LONGEST_S = 3600;
let events = [], version = null, source = null, offset_ms = 0, opened = null, diedAt_ms = null;

document.addEventListener("state", async ({ detail }) => {
  const chosen = chosenSource();
  if (detail.events !== version || chosen !== source) {
    if (chosen !== source) events = [];
    source = chosen;
    version = detail.events;
    try {
      const found = await ask(`events?source=${encodeURIComponent(chosen)}`);
      if (chosen !== source) return;
      events = found.events.toReversed(); // the newest first
      offset_ms = Date.parse(found.now_at) - Date.now(); // the clock of a phone may be wrong
      listTiles();
    } catch { version = null; }
  }
  draw();
});

// What was in view when the pictures stopped is not in view now.
document.addEventListener("health", ({ detail }) => {
  diedAt_ms = detail ? null : now_ms();
  listTiles();
  draw();
});

const goesOn = (event) => event.in_view && diedAt_ms === null;
const now_ms = () => Date.now() + offset_ms;
const begin_ms = (event) => Date.parse(event.begin_at);
const end_ms = (event) => (event.in_view ? diedAt_ms ?? now_ms() : Date.parse(event.end_at));
const clock = (at_ms, seconds = true) => new Date(at_ms - offset_ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(seconds ? { second: "2-digit" } : {}) });
const link = (which, event) => `events/${which}.jpg?source=${encodeURIComponent(source)}&event=${event.event}&frame=${event.best_frame}`;
const sure = (event) => (event.confidence === null ? "" : `${Math.round(100 * event.confidence)} %`);

function lasted(event) {
  const seconds = Math.max(1, Math.round((end_ms(event) - begin_ms(event)) / 1000));
  return seconds < 90 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
}

const when = (event) => (goesOn(event) ? `since ${clock(begin_ms(event))}` : `at ${clock(begin_ms(event))}, for ${lasted(event)}`);

// Tiles stay where they are as long as their event is listed: what a hand points at does not jump away.
function listTiles() {
  const list = by("events-list"), there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  by("events-none").hidden = events.length > 0;
  list.hidden = events.length === 0;
  list.replaceChildren(...events.map((event) => {
    const key = `${source} ${event.event}`, item = there.get(key) ?? newTile(key);
    const image = item.querySelector("img"), address = link("thumbnail", event);
    if (image.getAttribute("src") !== address) image.src = address;
    item.querySelector("b").textContent = event.name;
    item.querySelector("small").textContent = goesOn(event) ? "in view now" : `${clock(begin_ms(event))} · ${lasted(event)}`;
    item.firstChild.classList.toggle("now", goesOn(event));
    item.firstChild.setAttribute("aria-label", `${event.name}, ${when(event)}: show the picture`);
    return item;
  }));
  if (opened !== null && by("event").open) show(opened);
}

function newTile(key) {
  const item = document.createElement("li");
  item.dataset.key = key;
  item.innerHTML = '<button type="button"><img alt=""><b></b><small></small></button>';
  item.firstChild.addEventListener("click", () => open(Number(key.slice(key.lastIndexOf(" ") + 1))));
  return item;
}

// The bars: a lane for each name, the last hour at most. They repeat what the tiles say, for the eye.
function draw() {
  by("events").hidden = false;
  by("events-bars").hidden = events.length === 0;
  if (!events.length) return;
  const now = now_ms(), first = Math.min(...events.map(begin_ms));
  const span_s = Math.min(LONGEST_S, Math.max(SHORTEST_S, (now - first) / 1000)), from = now - span_s * 1000;
  const place = (at) => `${Math.max(0, Math.min(100, ((at - from) / (span_s * 10))))}%`;
  const counts = new Map();
  for (const event of events) if (end_ms(event) >= from) counts.set(event.name, (counts.get(event.name) ?? 0) + 1);
  const names = [...counts.keys()].slice(0, MOST_LANES);
  by("events-bars").replaceChildren(...names.map((name) => {
    const lane = document.createElement("div"), title = document.createElement("span"), track = document.createElement("div");
    title.textContent = name;
    for (const event of events.filter((each) => each.name === name && end_ms(each) >= from)) {
      const bar = document.createElement("i");
      bar.style.left = place(begin_ms(event));
      bar.style.right = `calc(100% - ${place(end_ms(event))})`;
      bar.title = `${name}, ${when(event)}`;
      bar.classList.toggle("now", goesOn(event));
      bar.addEventListener("click", () => open(event.event));
      track.append(bar);
    }
    lane.append(title, track);
    return lane;
  }), scale(from, now));
}

function scale(from, now) {
  const line = document.createElement("div"), texts = [clock(from, now - from < 600000), "now"];
  line.className = "scale";
  line.append(...texts.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
  return line;
}

// The picture of an event, with the older and the newer one beside it.
function open(number) {
  show(number);
  if (!by("event").open) by("event").showModal();
}

function show(number) {
  const at = events.findIndex((each) => each.event === number);
  if (at < 0) return;
  opened = number;
  const event = events[at], address = link("picture", event);
  by("event-title").textContent = [event.name, sure(event)].filter(Boolean).join(", up to ");
  by("event-words").textContent = `In view ${when(event)}. The picture shows it best, at ${clock(begin_ms(event) + 1000 * (event.best_s - event.begin_s))}.`;
  if (by("event-picture").getAttribute("src") !== address) by("event-picture").src = address;
  by("event-picture").alt = `${event.name} in a frame of ${source}`;
  by("event-newer").disabled = at === 0;
  by("event-older").disabled = at === events.length - 1;
}

const step = (by_) => { const at = events.findIndex((each) => each.event === opened) + by_; if (events[at]) show(events[at].event); };
by("event-newer").addEventListener("click", () => step(-1));
by("event-older").addEventListener("click", () => step(1));
by("event").addEventListener("keydown", ({ key }) => { if (key === "ArrowLeft") step(1); if (key === "ArrowRight") step(-1); });
by("event").addEventListener("close", () => { opened = null; });
