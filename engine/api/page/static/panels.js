// Fill the overview's parts from the tables.

import { adapterLink, byId, element, meter, setText, table } from "./dom.js";
import { ago, bytes, count, percent, percentile, seconds } from "./format.js";

const MOST_PULLS = 12;
const REASONS = {
  start: "the coordinator began",
  node_joined: "a node joined",
  node_left: "a node left",
  node_pace: "a node's pace changed",
  demand: "demand shifted",
  pin: "a pin changed",
  failed_load: "a node could not get an adapter",
  adapter_added: "an adapter was added",
};
const SIZE_REASONS = {
  start: "as many ran when the coordinator began",
  bounds: "the bounds allow no other",
  load: "fewer would be too busy to answer in time",
  memory: "fewer have no room for the adapters that are asked for",
  refused: "fewer have refused requests again and again",
  calm: "one more was not needed for long enough",
};
const COUNTERS = {
  requests_refused: "refused",
  requests_forwarded: "sent to",
  requests_moved: "requests moved to another node",
  streams_moved: "streams moved to another node",
};

/** Return names in order, numbers within them by their size. */
export function inOrder(names) {
  return [...names].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
}

/** Show the numbers at the top. */
export function showSummary(tables) {
  const { server } = tables;
  const nodes = [...tables.rows("nodes").values()];
  const serving = nodes.filter((node) => node.state === "serving").length;
  const minute = (name) => {
    const keys = [...tables.rows("counters")].filter(([, row]) => row.name === name).map(([key]) => key);
    return keys.reduce((sum, key) => sum + tables.windows.counters.grown(key, "count"), 0);
  };
  const size = tables.rows("size").get("");
  const held = [...tables.rows("adapters").values()].filter((row) => row.held_until_s > tables.nowS).length;
  const ofRequests = [
    ["sequences that run", count(server.running)],
    ["that wait", count(server.waiting)],
    ["refused, last minute", count(minute("requests_refused"))],
    ["moved, last minute", count(minute("requests_moved"))],
  ];
  const tiles = [
    ["nodes that serve", `${serving} of ${nodes.length}`],
    ...(held ? [["adapters held", count(held)]] : []),
    ...(size ? [["nodes wanted", count(size.wanted)]] : []),
    ["adapters", count(server.adapters)],
    ...(server.running === undefined ? [] : ofRequests),
  ];
  byId("summary").replaceChildren(...tiles.map(([told, value]) =>
    element("div", { class: "tile" }, element("dt", {}, told), element("dd", {}, value))));
}

/** Show how many nodes there should be, where that follows the load, and why. */
export function showSize(tables) {
  const size = tables.rows("size").get("");
  byId("size").hidden = size === undefined;
  if (size === undefined) return;
  const bounds = size.highest ? ` (of ${count(size.lowest)} to ${count(size.highest)})` : "";
  const why = SIZE_REASONS[size.reason] || size.reason;
  setText(byId("size"), `Nodes wanted: ${count(size.wanted)}${bounds}, present: ${count(size.present)}. `
    + `Chosen ${ago(size.at_s, tables.nowS)}: ${why}.`);
}

/** Show the nodes, with their load and memory. */
export function showNodes(tables) {
  const columns = [
    { title: "Node" }, { title: "State" }, { title: "Load" }, { title: "Memory" },
    { title: "Requests", kind: "number", wide: true }, { title: "Held", kind: "number", wide: true },
    { title: "Arriving", kind: "number", wide: true }, { title: "Pace", kind: "number", wide: true },
    { title: "Zone", wide: true },
  ];
  const rows = inOrder(tables.rows("nodes").keys()).map((name) => tables.rows("nodes").get(name)).map((node) => [
    node.name,
    element("span", { class: "badge", "data-state": node.state }, node.state),
    node.load === undefined ? "–" : meter(node.load, percent(node.load), "load"),
    memory(node),
    node.requests === undefined ? "–" : count(node.requests),
    count((node.held ?? 0) + (node.cached ?? 0)),
    count(node.arriving ?? 0),
    node.slowdown === undefined ? "–" : `${node.slowdown.toFixed(2)}×`,
    node.zone || "–",
  ]);
  byId("nodes").replaceChildren(rows.length ? table("Nodes", columns, rows) : nothing("no node is known"));
}

function memory(node) {
  if (!node.memory_bytes) return "–";
  const part = (node.used_bytes ?? 0) / node.memory_bytes;
  const made = meter(part, percent(part), "memory");
  made.append(element("span", { class: "wide-only note" }, `of ${bytes(node.memory_bytes)}`));
  return made;
}

/** Show times to the first token and between tokens, by rank. */
export function showLatency(tables) {
  const window = tables.windows.latency;
  const columns = [
    { title: "Rank" }, { title: "Requests", kind: "number" },
    { title: "TTFT P50", kind: "number", wide: true }, { title: "TTFT P95" },
    { title: "TBT P50", kind: "number", wide: true }, { title: "TBT P95" },
  ];
  const found = [...tables.rows("latency").keys()].map((rank) => ({
    rank, requests: window.grown(rank, "requests"),
    ...times(window, rank, tables.bounds),
  }));
  const longest = (name) => Math.max(1e-9, ...found.map((each) => each[name] ?? 0));
  const [ttft, tbt] = [longest("ttft95"), longest("tbt95")];
  const rows = found.map((each) => [
    each.rank === "0" ? "base" : each.rank, count(each.requests), seconds(each.ttft50),
    each.ttft95 === null ? "–" : bar(each.ttft95, ttft), seconds(each.tbt50),
    each.tbt95 === null ? "–" : bar(each.tbt95, tbt),
  ]);
  const absent = "no request has passed this server yet";
  byId("latency").replaceChildren(
    rows.length ? table("Latency by rank", columns, rows) : nothing(absent));
}

/** Return the percentiles of a row's times within the last minute. */
export function times(window, key, bounds) {
  const [ttft, tbt] = [window.grown(key, "ttft"), window.grown(key, "tbt")];
  const of = (counts, kind, part) => Array.isArray(counts) ? percentile(counts, bounds[kind], part) : null;
  return {
    ttft50: of(ttft, "ttft", 0.5), ttft95: of(ttft, "ttft", 0.95),
    tbt50: of(tbt, "tbt", 0.5), tbt95: of(tbt, "tbt", 0.95),
  };
}

function bar(value, longest) {
  const made = meter(value / longest, seconds(value));
  made.dataset.level = "usual";
  return made;
}

/** Show what is pulled at this moment. */
export function showPulls(tables) {
  const pulls = [];
  for (const [name, row] of tables.rows("adapters")) {
    for (const [node, tier] of Object.entries(row.tiers || {})) {
      if (tier === "arriving") pulls.push([name, node, row]);
    }
  }
  const shown = pulls.slice(0, MOST_PULLS).map(([name, node, row]) =>
    element("li", {}, adapterLink(name), ` to ${node}`,
      element("span", { class: "note" }, ` rank ${row.rank}, ${bytes(row.bytes)}`)));
  const more = pulls.length > MOST_PULLS ? [element("li", {}, `and ${count(pulls.length - MOST_PULLS)} more`)] : [];
  byId("pulls").replaceChildren(
    pulls.length ? element("ul", { class: "plain" }, ...shown, ...more) : nothing("nothing is on its way"));
}

/** Show the last changes of the placement, and why they were made. */
export function showPlacements(tables) {
  const numbers = [...tables.rows("placements").keys()].sort((a, b) => b - a);
  const shown = numbers.map((number) => {
    const row = tables.rows("placements").get(number);
    const reasons = row.reasons.map((each) => REASONS[each] || each).join(", ");
    const moves = row.moves.map((move) => element("li", {}, adapterLink(move.name), ` ${moved(move)}`));
    const left = row.adapters - row.moves.length;
    if (left > 0) moves.push(element("li", { class: "note" }, `and ${count(left)} more`));
    return element("li", {},
      element("details", { id: `placement-${number}` },
        element("summary", {}, element("strong", {}, reasons || "it was not told why"),
          element("span", { class: "note" },
            ` ${ago(row.at_s, tables.nowS)}, ${count(row.adapters)} adapters, ${bytes(row.bytes)} to fetch`)),
        element("ul", {}, ...moves)));
  });
  const open = new Set([...document.querySelectorAll("#placements details[open]")].map((each) => each.id));
  for (const each of shown) each.firstChild.open = open.has(each.firstChild.id);
  byId("placements").replaceChildren(
    shown.length ? element("ol", { class: "plain" }, ...shown) : nothing("the placement has not changed yet"));
}

function moved({ gained, lost }) {
  const parts = [];
  if (gained.length) parts.push(`to ${gained.join(", ")}`);
  if (lost.length) parts.push(`from ${lost.join(", ")}`);
  return parts.join(", ") || "changed its shares";
}

/** Show what was refused, sent and moved. */
export function showCounters(tables) {
  const rows = [...tables.rows("counters")]
    .filter(([, row]) => row.count > 0)
    .map(([key, row]) => [
      `${COUNTERS[row.name] || row.name}${row.label ? ` ${row.label.replaceAll("_", " ")}` : ""}`,
      count(tables.windows.counters.grown(key, "count")), count(row.count),
    ]);
  const columns = [
    { title: "Requests" }, { title: "Last minute", kind: "number" }, { title: "In all", kind: "number" },
  ];
  byId("counters").replaceChildren(
    rows.length ? table("Refused and moved", columns, rows) : nothing("nothing was refused or moved"));
}

/** Show batches, where the server takes any. */
export function showBatches(tables) {
  const row = tables.rows("batches").get("");
  byId("batches-card").hidden = row === undefined;
  if (row === undefined) return;
  const kinds = [
    ["queued", "waiting for their turn"], ["running", "running"], ["left", "requests without a result"],
    ["completed", "completed"], ["failed", "failed"], ["expired", "expired"], ["cancelled", "cancelled"],
  ];
  const rows = kinds.filter(([kind]) => kind in row).map(([kind, told]) => [told, count(row[kind])]);
  byId("batches").replaceChildren(table("Batches", [{ title: "Batches" }, { title: "Now, or since the start", kind: "number" }], rows));
}

function nothing(told) {
  return element("p", { class: "note" }, told);
}
