// Draw adapters by nodes, in order of ranks. Only what is visible is drawn, so that 10,000 adapters cost what 200 do.

import { byId, element, setText } from "./dom.js";
import { percent } from "./format.js";

const AXIS = 22; // pixels above the cells, for ranks
const LEAST_COLUMN = 5;
const MOST_COLUMN = 24;
const ROW = 24;
const MOST_HEIGHT = 440;
const SHADES = 12;
const HINT = "Point at a cell, or move with the arrow keys; a click or Enter opens the adapter.";
const TIERS = {
  device: "in the node's memory",
  arriving: "on its way to the node",
  host: "in host memory",
  disk: "on disk",
  source: "in its folder",
  folder: "in its folder, never read yet",
};

/** The map. It calls `onOpen` with the name of an adapter that is chosen. */
export class HeatMap {
  constructor(host, onOpen) {
    this.onOpen = onOpen;
    this.names = [];
    this.adapters = new Map();
    this.nodes = [];
    this.cell = null; // {column, row} under the pointer or the keyboard
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.space = element("div", { class: "heat-space" }, this.canvas);
    this.spoken = element("div", { id: "heat-cell", role: "gridcell" });
    this.scroller = element("div", {
      class: "heat-scroll", role: "grid", tabindex: "0", "aria-labelledby": "heat-title",
      "aria-describedby": "heat-keys",
      on: {
        scroll: () => this.draw(), keydown: (event) => this.#key(event), blur: () => this.#point(null),
        pointermove: (event) => this.#point(this.#at(event)), pointerleave: () => this.#point(null),
        click: (event) => this.#open(this.#at(event)),
      },
    }, element("div", { role: "row", class: "unseen" }, this.spoken), this.space);
    this.status = element("p", { class: "heat-status" }, HINT);
    const keys = element("p", { id: "heat-keys", class: "unseen" },
      "Arrow keys move, Page Up and Page Down go to the next rank, Enter opens the adapter.");
    host.replaceChildren(this.scroller, this.status, keys);
    this.#legend();
    new ResizeObserver(() => this.layout()).observe(host);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#restyle());
    this.#restyle();
  }

  /** Show these nodes, and adapters in this order. */
  order(names, nodes) {
    this.names = names;
    this.nodes = nodes;
    this.cell = null;
    this.layout();
  }

  /** Show what the rows say by now. */
  update(adapters) {
    this.adapters = adapters;
    this.draw();
  }

  /** Fit everything to the room there is. */
  layout() {
    const width = this.scroller.clientWidth;
    if (!width) return;
    this.gutter = width < 520 ? 76 : 112;
    const least = matchMedia("(pointer: coarse)").matches ? 10 : LEAST_COLUMN;
    const fair = (width - this.gutter) / Math.max(1, this.names.length);
    this.column = Math.max(least, Math.min(MOST_COLUMN, fair));
    const height = AXIS + this.nodes.length * ROW;
    this.scroller.style.blockSize = `${Math.min(MOST_HEIGHT, height) + 16}px`;
    this.space.style.inlineSize = `${Math.floor(this.gutter + this.names.length * this.column)}px`;
    this.space.style.blockSize = `${height}px`;
    this.scroller.setAttribute("aria-rowcount", this.nodes.length);
    this.scroller.setAttribute("aria-colcount", this.names.length);
    this.width = width;
    this.height = Math.min(height, this.scroller.clientHeight);
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.inlineSize = `${this.width}px`;
    this.canvas.style.blockSize = `${this.height}px`;
    this.draw();
  }

  /** Draw soon: at most once a frame. */
  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.#paint();
    });
  }

  #paint() {
    const paint = this.canvas.getContext("2d");
    const { scrollLeft, scrollTop } = this.scroller;
    paint.setTransform(window.devicePixelRatio || 1, 0, 0, window.devicePixelRatio || 1, 0, 0);
    paint.fillStyle = this.colours.surface;
    paint.fillRect(0, 0, this.width, this.height);
    if (!this.names.length || !this.nodes.length) return;
    const first = Math.floor(scrollLeft / this.column);
    const end = Math.min(this.names.length, Math.ceil((scrollLeft + this.width - this.gutter) / this.column));
    const top = Math.floor(scrollTop / ROW);
    const bottom = Math.min(this.nodes.length, Math.ceil((scrollTop + this.height - AXIS) / ROW));
    paint.font = this.font;
    paint.save();
    paint.beginPath();
    paint.rect(this.gutter, 0, this.width - this.gutter, this.height);
    paint.clip();
    for (let at = first; at < end; at += 1) this.#paintColumn(paint, at, top, bottom, scrollLeft, scrollTop);
    this.#paintRanks(paint, first, end, scrollLeft);
    this.#paintCell(paint, scrollLeft, scrollTop);
    paint.restore();
    this.#paintNodes(paint, top, bottom, scrollTop);
  }

  #paintColumn(paint, at, top, bottom, scrollLeft, scrollTop) {
    const row = this.adapters.get(this.names[at]);
    const [x, next] = [at, at + 1].map((each) => Math.round(this.gutter + each * this.column - scrollLeft));
    const width = Math.max(1, next - x - 1);
    for (let node = top; node < bottom; node += 1) {
      const y = AXIS + node * ROW - scrollTop;
      if (y < AXIS - ROW) continue;
      const tier = row?.tiers?.[this.nodes[node]];
      const share = row?.shares?.[this.nodes[node]];
      paint.fillStyle = this.#colour(tier, share);
      if (tier === "arriving") paint.fillRect(x, y + ROW / 2 - 3, width, 6);
      else paint.fillRect(x, y + 1, width, ROW - 2);
    }
  }

  #colour(tier, share) {
    if (tier === "arriving") return this.colours.arriving;
    if (tier !== undefined && tier !== "device") return this.colours.far;
    if (tier === undefined) return share ? this.colours.missing : this.colours.empty;
    if (share === undefined && this.nodes.length > 1) return this.colours.kept;
    return this.shades[Math.min(SHADES - 1, Math.round(Math.sqrt(share ?? 1) * (SHADES - 1)))];
  }

  #paintRanks(paint, first, end, scrollLeft) {
    paint.fillStyle = this.colours.surface;
    paint.fillRect(0, 0, this.width, AXIS);
    let free = -Infinity;
    for (let at = first; at < end; at += 1) {
      const rank = this.adapters.get(this.names[at])?.rank;
      const begins = at === 0 || this.adapters.get(this.names[at - 1])?.rank !== rank;
      if (!begins && at !== first) continue;
      const x = Math.max(this.gutter, Math.round(this.gutter + at * this.column - scrollLeft));
      if (begins && at > 0) {
        paint.fillStyle = this.colours.line;
        paint.fillRect(x - 1, 0, 1, this.height);
      }
      const text = rank ? `rank ${rank}` : "not read";
      if (x < free) continue;
      paint.fillStyle = this.colours.muted;
      paint.fillText(text, x + 3, 15);
      free = x + paint.measureText(text).width + 10;
    }
  }

  #paintCell(paint, scrollLeft, scrollTop) {
    if (!this.cell) return;
    const x = this.gutter + this.cell.column * this.column - scrollLeft;
    paint.strokeStyle = this.colours.text;
    paint.lineWidth = 2;
    paint.strokeRect(x - 1, AXIS + this.cell.row * ROW - scrollTop, this.column + 1, ROW);
  }

  #paintNodes(paint, top, bottom, scrollTop) {
    paint.fillStyle = this.colours.surface;
    paint.fillRect(0, 0, this.gutter, this.height);
    paint.fillStyle = this.colours.text;
    for (let node = top; node < bottom; node += 1) {
      const y = AXIS + node * ROW - scrollTop;
      if (y < AXIS - ROW / 2) continue;
      paint.fillText(shortened(paint, this.nodes[node], this.gutter - 10), 2, y + 16);
    }
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left;
    const y = event.clientY - box.top;
    if (x < this.gutter || y < AXIS) return null;
    const column = Math.floor((x - this.gutter + this.scroller.scrollLeft) / this.column);
    const row = Math.floor((y - AXIS + this.scroller.scrollTop) / ROW);
    return column < this.names.length && row < this.nodes.length ? { column, row } : null;
  }

  #point(cell) {
    this.cell = cell;
    setText(this.status, cell ? this.told(cell) : HINT);
    this.draw();
  }

  #open(cell) {
    if (cell) this.onOpen(this.names[cell.column]);
  }

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const last = this.names.length - 1;
    if (last < 0) return;
    const { column, row } = this.cell || { column: 0, row: 0 };
    let to = null;
    if (event.key in steps && this.cell === null) to = { column, row };
    else if (event.key in steps) to = { column: column + steps[event.key][0], row: row + steps[event.key][1] };
    else if (event.key === "Home") to = { column: 0, row };
    else if (event.key === "End") to = { column: last, row };
    else if (event.key === "PageDown") to = { column: this.#nextRank(column, 1), row };
    else if (event.key === "PageUp") to = { column: this.#nextRank(column, -1), row };
    else if (event.key === "Enter" && this.cell) return this.#open(this.cell);
    if (to === null) return;
    event.preventDefault();
    to.column = Math.max(0, Math.min(last, to.column));
    to.row = Math.max(0, Math.min(this.nodes.length - 1, to.row));
    this.#show(to);
    this.#point(to);
    this.spoken.setAttribute("aria-colindex", to.column + 1);
    this.spoken.setAttribute("aria-rowindex", to.row + 1);
    setText(this.spoken, this.told(to));
    this.scroller.setAttribute("aria-activedescendant", "heat-cell");
  }

  #nextRank(column, step) {
    const rank = (at) => this.adapters.get(this.names[at])?.rank;
    let at = column;
    while (at + step >= 0 && at + step < this.names.length && rank(at) === rank(column)) at += step;
    return at;
  }

  #show({ column, row }) {
    const { scroller } = this;
    const x = column * this.column;
    const room = this.width - this.gutter - this.column;
    if (x < scroller.scrollLeft) scroller.scrollLeft = x;
    else if (x > scroller.scrollLeft + room) scroller.scrollLeft = x - room;
    const below = this.height - AXIS - ROW;
    if (row * ROW < scroller.scrollTop) scroller.scrollTop = row * ROW;
    else if (row * ROW > scroller.scrollTop + below) scroller.scrollTop = row * ROW - below;
  }

  /** Say what a cell shows. */
  told({ column, row }) {
    const name = this.names[column];
    const node = this.nodes[row];
    const adapter = this.adapters.get(name) || {};
    const tier = TIERS[adapter.tiers?.[node]] || "not there";
    const share = adapter.shares?.[node];
    const part = share === undefined ? "" : `, ${percent(share)} of its requests`;
    return `${name}, rank ${adapter.rank ?? "unknown"}, ${node}: ${tier}${part}`;
  }

  #restyle() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = Object.fromEntries(["surface", "text", "muted", "line"].map((name) => [name, read(name)]));
    for (const name of ["empty", "kept", "far", "missing", "arriving"]) this.colours[name] = read(`heat-${name}`);
    const [low, high] = [rgb(read("heat-low")), rgb(read("heat-high"))];
    this.shades = Array.from({ length: SHADES }, (_, at) => {
      const part = at / (SHADES - 1);
      return `rgb(${low.map((each, c) => Math.round(each + (high[c] - each) * part)).join(" ")})`;
    });
    this.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    this.draw();
  }

  #legend() {
    const kinds = [
      ["shares", "share of its requests"], ["kept", "kept, serves none"], ["arriving", "on its way"],
      ["missing", "routed here, not there yet"], ["far", "not in the node's memory"],
    ];
    byId("legend").replaceChildren(...kinds.map(([kind, told]) =>
      element("li", {}, element("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), told)));
  }
}

function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function shortened(paint, text, width) {
  if (paint.measureText(text).width <= width) return text;
  let kept = text;
  while (kept.length > 1 && paint.measureText(`…${kept}`).width > width) kept = kept.slice(1);
  return `…${kept}`;
}
