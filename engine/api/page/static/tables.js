// Hold what the server told: rows by table and key, and what some of them were a while ago.

const WINDOW_S = 60;

/** The tables as they are now. `changed` holds the names of those that changed since somebody last looked. */
export class Tables {
  constructor() {
    this.tables = new Map();
    this.bounds = { ttft: [], tbt: [] };
    this.changed = new Set();
    this.shape = 0; // grows when adapters come, go, or change their rank
    this.windows = { latency: new Window(), recent: new Window(), counters: new Window() };
  }

  /** Take in an event. */
  apply(kind, data) {
    if (kind === "whole") {
      this.bounds = data.bounds || this.bounds;
      this.tables = new Map();
      this.shape += 1;
      for (const [name, rows] of Object.entries(data.tables)) {
        this.tables.set(name, new Map(Object.entries(rows)));
        this.changed.add(name);
      }
    } else {
      for (const [name, change] of Object.entries(data)) this.#change(name, change);
    }
    for (const [name, window] of Object.entries(this.windows)) window.take(this.nowS, this.rows(name));
  }

  /** The rows of a table, by key. */
  rows(name) {
    return this.tables.get(name) || new Map();
  }

  /** What is told of the server as a whole. */
  get server() {
    return this.rows("server").get("") || {};
  }

  /** The server's time, in seconds since 1970. */
  get nowS() {
    return this.server.time_s || 0;
  }

  /** Return the names of tables that changed since the last call. */
  takeChanged() {
    const changed = this.changed;
    this.changed = new Set();
    return changed;
  }

  #change(name, { set = {}, gone = [] }) {
    if (!this.tables.has(name)) this.tables.set(name, new Map());
    const rows = this.tables.get(name);
    for (const key of gone) rows.delete(key);
    if (name === "adapters" && gone.length) this.shape += 1;
    for (const [key, row] of Object.entries(set)) {
      const before = rows.get(key);
      if (name === "adapters" && (before === undefined || before.rank !== row.rank)) this.shape += 1;
      rows.set(key, row);
    }
    this.changed.add(name);
  }
}

/** What rows of numbers were, at most a minute ago; so that what happened since can be told. */
class Window {
  constructor() {
    this.past = []; // [time, rows by key]; a row is never changed, only replaced
  }

  take(nowS, rows) {
    if (this.past.length && this.past[this.past.length - 1][0] >= nowS) this.past.pop();
    this.past.push([nowS, new Map(rows)]);
    while (this.past.length > 1 && nowS - this.past[1][0] >= WINDOW_S) this.past.shift();
  }

  /** Return how much a row's field has grown within the window: a number, or a list of them. */
  grown(key, field) {
    const then = this.past[0]?.[1].get(key)?.[field];
    const now = this.past[this.past.length - 1]?.[1].get(key)?.[field];
    if (Array.isArray(now)) return now.map((value, at) => Math.max(0, value - (then?.[at] ?? 0)));
    return Math.max(0, (now ?? 0) - (then ?? 0));
  }
}
