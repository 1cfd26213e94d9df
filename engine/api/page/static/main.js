// Begin: connect to the server's events, and show the part of the page that the address names.

import { AskBox } from "./ask.js";
import { showAdapter } from "./adapter_page.js";
import { byId, setText } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import * as panels from "./panels.js";
import { EventStream } from "./stream.js";
import { Tables } from "./tables.js";

const KEY = "loraserve-key";
const tables = new Tables();
const heat = new HeatMap(byId("heat"), (name) => { location.hash = `#/adapter/${encodeURIComponent(name)}`; });
const ask = new AskBox(byId("ask"), () => sessionStorage.getItem(KEY) || "");
const stream = new EventStream("/page/events", take, showState);
let frame = 0;
let ordered = "";

const PANELS = [
  [panels.showSummary, ["server", "nodes", "counters", "size"]],
  [panels.showNodes, ["nodes"]],
  [panels.showSize, ["size", "server"]],
  [panels.showLatency, ["latency", "server"]],
  [panels.showBatches, ["batches"]],
  [panels.showPlacements, ["placements", "server"]],
  [panels.showPulls, ["adapters"]],
  [panels.showCounters, ["counters", "server"]],
];

function take(kind, data) {
  tables.apply(kind, data);
  if (!frame) frame = requestAnimationFrame(show);
}

/** Return the adapter that the address names, null for the overview. */
function opened() {
  const found = location.hash.match(/^#\/adapter\/(.+)$/);
  if (!found) return null;
  try {
    return decodeURIComponent(found[1]);
  } catch {
    return null;
  }
}

function show() {
  frame = 0;
  const changed = tables.takeChanged();
  const name = opened();
  byId("overview").hidden = name !== null;
  byId("adapter").hidden = name === null;
  const { server } = tables;
  if (server.version) setText(byId("model"), `${server.model || "coordinator"}, version ${server.version}`);
  document.title = name === null ? "loraserve" : `${name} – loraserve`;
  if (name !== null) {
    showAdapter(tables, name);
  } else {
    for (const [panel, names] of PANELS) if (names.some((each) => changed.has(each))) panel(tables);
    showHeat();
  }
  if (server.model) ask.choose(name ?? server.model, false);
}

/** Order the map anew where adapters, nodes or the filter changed; else only draw it. */
function showHeat() {
  const adapters = tables.rows("adapters");
  const nodes = panels.inOrder(tables.rows("nodes").keys());
  const filter = byId("filter").value.trim().toLowerCase();
  const now = [tables.shape, filter, ...nodes].join("\n");
  heat.adapters = adapters;
  if (now !== ordered) {
    ordered = now;
    const fits = ([name, row]) => !filter || name.toLowerCase().includes(filter) || String(row.rank) === filter;
    const kept = [...adapters].filter(fits);
    kept.sort(([a, x], [b, y]) => (x.rank ?? 0) - (y.rank ?? 0) || (a < b ? -1 : 1));
    heat.order(kept.map(([name]) => name), nodes);
    ask.suggest([...(tables.server.model ? [tables.server.model] : []), ...adapters.keys()]);
  }
  heat.update(adapters);
}

/** Show everything, whatever changed. */
function showAll() {
  for (const name of ["server", "nodes", "adapters", "latency", "placements", "counters", "size", "batches"]) tables.changed.add(name);
  if (!frame) frame = requestAnimationFrame(show);
}

function showState(state, message) {
  const words = { live: "live", lost: "connecting again", key: "a key is needed", forbidden: "not allowed" };
  const shown = byId("state");
  if (shown.dataset.state !== state) {
    shown.dataset.state = state;
    setText(shown, words[state]);
    byId("key-form").hidden = state === "live" || state === "lost";
  }
  setText(byId("key-reason"), message);
  document.body.classList.toggle("stale", state !== "live");
}

byId("key-button").addEventListener("click", () => {
  const form = byId("key-form");
  form.hidden = !form.hidden;
  if (!form.hidden) byId("key").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  byId("key-form").hidden = true;
  stream.start(sessionStorage.getItem(KEY) || "");
});
byId("key-forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  stream.start("");
});
byId("filter").addEventListener("input", showAll);
addEventListener("hashchange", () => {
  const name = opened();
  if (name !== null) ask.choose(name, true);
  showAll();
  byId("main").focus();
});
if (opened() !== null) ask.choose(opened(), true);
stream.start(sessionStorage.getItem(KEY) || "");
