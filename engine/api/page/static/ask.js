// Ask an adapter something, and show the answer as it comes.

import { element, setText } from "./dom.js";
import { seconds } from "./format.js";
import { serverEvents } from "./stream.js";

const MOST_SUGGESTED = 200;

/** The form. `key()` returns the key to send. */
export class AskBox {
  constructor(host, key) {
    this.key = key;
    this.abort = null;
    this.model = element("input", { id: "ask-model", list: "ask-models", required: true, spellcheck: "false" });
    this.models = element("datalist", { id: "ask-models" });
    this.prompt = element("textarea", { id: "ask-prompt", rows: "3", required: true });
    this.most = element("input", { id: "ask-most", type: "number", min: "1", value: "128" });
    this.send = element("button", { type: "submit" }, "Ask");
    this.stop = element("button", { type: "button", disabled: true, on: { click: () => this.abort?.abort() } }, "Stop");
    this.answer = element("pre", { class: "answer", "aria-live": "polite", "aria-label": "Answer", tabindex: "0" });
    this.told = element("p", { class: "note", role: "status" });
    host.replaceChildren(
      element("form", { class: "ask", on: { submit: (event) => this.#submit(event) } },
        field("Adapter or model", this.model, this.models), field("Most tokens", this.most),
        field("Message", this.prompt), element("div", { class: "bar" }, this.send, this.stop)),
      this.answer, this.told);
  }

  /** Suggest names. */
  suggest(names) {
    if (names.length === this.models.childElementCount) return;
    this.models.replaceChildren(...names.slice(0, MOST_SUGGESTED).map((name) => element("option", { value: name })));
  }

  /** Choose whom to ask; a name that somebody has typed stays unless `name` is one that was opened. */
  choose(name, isOpened) {
    if (isOpened || !this.model.value) this.model.value = name;
  }

  async #submit(event) {
    event.preventDefault();
    this.abort?.abort();
    const abort = new AbortController();
    this.abort = abort;
    this.stop.disabled = false;
    setText(this.answer, "");
    setText(this.told, "asking");
    try {
      await this.#ask(abort.signal);
    } catch (error) {
      setText(this.told, abort.signal.aborted ? "stopped" : `the server does not answer: ${error.message}`);
    }
    if (this.abort === abort) this.stop.disabled = true;
  }

  async #ask(signal) {
    const began = performance.now();
    const key = this.key();
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) },
      body: JSON.stringify({
        model: this.model.value, stream: true, max_tokens: Number(this.most.value) || 128,
        messages: [{ role: "user", content: this.prompt.value }],
      }),
      signal,
    });
    if (!response.ok) {
      setText(this.told, (await response.json()).error.message);
      return;
    }
    let first = null;
    let parts = 0;
    for await (const { data } of serverEvents(response.body.getReader())) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) {
        setText(this.told, event.error.message);
        return;
      }
      const text = event.choices[0]?.delta?.content;
      if (!text) continue;
      first ??= performance.now();
      parts += 1;
      this.answer.append(text);
    }
    const whole = seconds((performance.now() - began) / 1000);
    setText(this.told, first === null
      ? `an empty answer after ${whole}`
      : `first text after ${seconds((first - began) / 1000)}, whole after ${whole}, in ${parts} parts`);
  }
}

function field(title, input, ...beside) {
  return element("div", { class: "field" }, element("label", { for: input.id }, title), input, ...beside);
}
