// Read the server's events with the key in a header, which EventSource could not send, and begin anew when they end.

const LEAST_WAIT_S = 1;
const MOST_WAIT_S = 15;

/** The stream of events. Tells `onEvent(kind, data)` and `onState(state, message)`: live, lost, key or forbidden. */
export class EventStream {
  constructor(path, onEvent, onState) {
    this.path = path;
    this.onEvent = onEvent;
    this.onState = onState;
    this.attempt = 0;
    this.abort = null;
    this.timer = 0;
  }

  /** Begin, or begin anew, with a key ("" for none). */
  start(key) {
    this.stop();
    this.attempt = 0;
    this.#connect(key);
  }

  /** End. */
  stop() {
    clearTimeout(this.timer);
    if (this.abort) this.abort.abort();
  }

  async #connect(key) {
    const abort = new AbortController();
    this.abort = abort;
    let waitS = Math.min(MOST_WAIT_S, LEAST_WAIT_S * 2 ** this.attempt);
    this.attempt += 1;
    try {
      const headers = key ? { Authorization: `Bearer ${key}` } : {};
      const response = await fetch(this.path, { headers, signal: abort.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        const told = await response.json();
        this.onState(response.status === 401 ? "key" : "forbidden", told.error.message);
        return;
      }
      if (response.ok) {
        await this.#read(response.body.getReader());
        waitS = LEAST_WAIT_S;
      } else {
        waitS = Math.max(waitS, Number(response.headers.get("Retry-After")) || 0);
      }
    } catch (error) {
      if (abort.signal.aborted) return;
    }
    if (abort.signal.aborted) return;
    this.onState("lost", "the server does not answer");
    this.timer = setTimeout(() => this.#connect(key), 1000 * waitS * (0.75 + Math.random() / 2));
  }

  async #read(reader) {
    for await (const { event, data } of serverEvents(reader)) {
      this.attempt = 0;
      this.onEvent(event, JSON.parse(data));
      this.onState("live", "");
    }
  }
}

/** Yield server-sent events {event, data} from a reader of bytes. */
export async function* serverEvents(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    if (!rest.includes("\n\n", Math.max(0, rest.length - value.length - 1))) continue;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield parsed(block);
  }
}

function parsed(block) {
  const fields = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
  }
  return fields;
}
