// Run the page's modules on a document that draws nothing: node stub_dom.js BASE_URL FOLDER [#HASH]
// Writes the texts of the page's parts as JSON once they are filled; a part that is hidden is null.
const [base, folder, hash = ""] = process.argv.slice(2);
const SHOWN = ["model", "summary", "size", "nodes", "batches-card", "batches", "adapter"];

class StubElement {
  constructor() {
    Object.assign(this, { attributes: {}, children: [], dataset: {}, style: {}, value: "", hidden: false });
    this.classList = { toggle() {} };
  }
  setAttribute(name, value) { this.attributes[name] = value; }
  getAttribute(name) { return this.attributes[name] ?? null; }
  addEventListener() {}
  append(...parts) { this.children.push(...parts); }
  replaceChildren(...parts) { this.children = parts; }
  contains() { return false; }
  focus() {}
  querySelectorAll() { return []; }
  getContext() { return new Proxy({}, { get: () => () => ({ width: 1 }), set: () => true }); }
  getBoundingClientRect() { return { left: 0, top: 0, width: 800, height: 300 }; }
  get clientWidth() { return 800; }
  get firstChild() { return this.children[0]; }
  get childElementCount() { return this.children.length; }
  get textContent() { return this.children.map((each) => each.textContent ?? each).join(" "); }
  set textContent(text) { this.children = [text]; }
}

const parts = {};
const ask = fetch;
Object.assign(globalThis, {
  window: globalThis,
  location: { hash },
  document: {
    createElement: () => new StubElement(), getElementById: (id) => (parts[id] ??= new StubElement()),
    querySelectorAll: () => [], body: new StubElement(), documentElement: new StubElement(), activeElement: null,
  },
  sessionStorage: { getItem: () => null, setItem() {}, removeItem() {} },
  addEventListener() {},
  requestAnimationFrame: (draw) => setTimeout(draw, 0),
  ResizeObserver: class { observe() {} },
  matchMedia: () => ({ matches: false, addEventListener() {} }),
  getComputedStyle: () => ({ getPropertyValue: () => "#123456" }),
  fetch: (path, options) => ask(base + path, options),
});
await import(`${folder}/main.js`);
const looking = setInterval(() => {
  if (!parts.model?.textContent || !(parts.adapter.hidden ? parts.nodes : parts.adapter)?.textContent) return;
  clearInterval(looking);
  const told = SHOWN.map((id) => [id, !parts[id] || parts[id].hidden ? null : parts[id].textContent]);
  process.stdout.write(JSON.stringify(Object.fromEntries(told)), () => process.exit(0));
}, 10);
