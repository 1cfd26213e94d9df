// Show one adapter: what its name means, where its copies are, how fast it answers.

import { adapterLink, byId, element, meter, table } from "./dom.js";
import { ago, bytes, count, percent, seconds } from "./format.js";
import { times } from "./panels.js";

/** Fill the adapter's page. The text that reads the same is left alone, so that focus and selection stay. */
export function showAdapter(tables, name) {
  const row = tables.rows("adapters").get(name);
  const parts = [
    element("p", {}, element("a", { href: "#/" }, "All adapters")),
    element("h2", { id: "adapter-title" }, name),
    ...(row ? told(tables, name, row) : [element("p", {}, "No adapter has this name.")]),
  ];
  const page = byId("adapter");
  const focused = page.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  page.replaceChildren(...parts);
  if (focused !== null) {
    [...page.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus();
  }
}

function told(tables, name, row) {
  return [
    row.error ? element("p", { class: "error" }, row.error) : null,
    facts(tables, name, row),
    element("h3", {}, "Copies"),
    element("div", { class: "scroll" }, copies(tables, row)),
    ...(answers(tables) ? [element("h3", {}, "Latency"), latency(tables, name)] : []),
    ...versions(tables, name, row),
  ].filter((part) => part !== null);
}

/** Tell for how long it takes no requests; null where it does. */
function held(tables, row) {
  const leftS = (row.held_until_s ?? 0) - tables.nowS;
  return leftS > 0 ? `takes no requests for ${seconds(leftS)}` : null;
}

/** Tell whether this server answers requests: a coordinator does not. */
function answers(tables) {
  return tables.server.running !== undefined;
}

function facts(tables, name, row) {
  const uses = row.last_use_s ? ago(row.last_use_s, tables.nowS) : "not lately";
  const pairs = [
    ["Version", row.version || "never read yet"],
    ["Alias of", row.alias_of ? adapterLink(row.alias_of) : null],
    ["Rank", row.rank === undefined ? "–" : String(row.rank)],
    ["Size", bytes(row.bytes)],
    ["Pinned copies", row.pinned ? count(row.pinned) : "none"],
    ["Most requests at once", row.max_requests ? count(row.max_requests) : "any number"],
    ["Held here", held(tables, row)],
    ["Requests under way here", answers(tables) ? count(row.in_flight ?? 0) : null],
    ["Last used here", answers(tables) ? uses : null],
  ].filter(([, value]) => value !== null);
  return element("dl", { class: "facts" },
    ...pairs.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))));
}

function copies(tables, row) {
  const nodes = new Set([...tables.rows("nodes").keys(), ...Object.keys(row.tiers || {})]);
  const rows = [...nodes].map((node) => {
    const share = row.shares?.[node];
    return [node, row.tiers?.[node] || "–", share === undefined ? "–" : meter(share, percent(share), "share")];
  });
  return table("Copies by node", [{ title: "Node" }, { title: "Tier" }, { title: "Share of its requests" }], rows);
}

function latency(tables, name) {
  const all = tables.rows("recent").get(name);
  if (!all) return element("p", { class: "note" }, "It has not been asked here lately.");
  const found = times(tables.windows.recent, name, tables.bounds);
  const rows = [
    ["Time to the first token", seconds(found.ttft50), seconds(found.ttft95)],
    ["Time between tokens", seconds(found.tbt50), seconds(found.tbt95)],
  ];
  const columns = [{ title: "Last minute" }, { title: "P50", kind: "number" }, { title: "P95", kind: "number" }];
  const ends = Object.entries(all.finished).map(([reason, number]) => `${count(number)} ${reason}`).join(", ");
  return element("div", {},
    table("Latency of this adapter", columns, rows),
    element("p", { class: "note" },
      `Since the start: ${count(all.requests)} requests (${ends || "none has ended"}), `
      + `${count(all.output_tokens)} tokens.`));
}

function versions(tables, name, row) {
  const others = row.version
    ? [...tables.rows("adapters")].filter(([other, its]) => other !== name && its.version === row.version)
    : [];
  if (!others.length) return [];
  const links = others.slice(0, 20).map(([other]) => element("li", {}, adapterLink(other)));
  return [element("h3", {}, "Names that mean the same version"), element("ul", { class: "plain" }, ...links)];
}
