// Make elements. Text goes in by textContent only, so that a name is never read as markup.

/** Make an element: `properties` are attributes, or listeners under `on`; children are elements or texts. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (value === true) {
      made.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(name, String(value));
    }
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Find an element of the page that is there. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element ${id}`);
  return found;
}

/** Set an element's text unless it has it already, which would disturb a reader. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Make a table. Columns are {title, kind, wide}; a row is a list of texts or elements. */
export function table(caption, columns, rows) {
  const marks = (column) =>
    [column.kind === "number" ? "number" : "", column.wide ? "wide-only" : ""].join(" ").trim() || null;
  const head = columns.map((column) => element("th", { scope: "col", class: marks(column) }, column.title));
  const body = rows.map((cells) =>
    element("tr", {}, ...cells.map((cell, at) =>
      at === 0
        ? element("th", { scope: "row", class: marks(columns[at]) }, cell)
        : element("td", { class: marks(columns[at]) }, cell))));
  return element("table", {},
    element("caption", { class: "unseen" }, caption),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...body));
}

/** Make a bar that shows a part of a whole, with its text beside it. */
export function meter(part, text, label) {
  const filled = element("span", { class: "filled" });
  filled.style.inlineSize = `${Math.round(100 * Math.max(0, Math.min(1, part || 0)))}%`;
  const level = part > 0.95 ? "full" : part > 0.8 ? "high" : "usual";
  return element("span", { class: "meter", "data-level": level },
    element("span", { class: "track", "aria-hidden": "true" }, filled),
    element("span", { class: "told", "aria-label": label ? `${label}: ${text}` : null }, text));
}

/** Link to an adapter's page. */
export function adapterLink(name) {
  return element("a", { href: `#/adapter/${encodeURIComponent(name)}` }, name);
}
