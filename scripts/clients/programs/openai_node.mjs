// OpenAI's own client for Node. It reports as the Python programs do (scripts/clients/probe.py).

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import OpenAI from "openai";

const { values: given } = parseArgs({
  options: {
    url: { type: "string" },
    key: { type: "string" },
    rpc: { type: "string" },
    out: { type: "string" },
  },
});
const WORD = "garden";
const REVERSED = "nedrag";
const ASK = [{ role: "user", content: WORD }];
const LONG_TOKENS = 1500;
const CITIES = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const WEATHER = { type: "function", function: { name: "weather", parameters: CITIES } };
const client = new OpenAI({ baseURL: `${given.url}/v1`, apiKey: given.key, maxRetries: 0 });
const tried = [];

function record(what, outcome, why = "") {
  const text = why.replaceAll(given.url, "http://SERVER").replace(/\s+/g, " ").slice(0, 300);
  tried.push({ what, outcome, why: text });
  console.log(`${what}: ${outcome} ${text}`);
}

async function tries(what, attempt) {
  try {
    await attempt();
    record(what, "ok");
  } catch (error) {
    console.error(error);
    record(what, "fails", `${error.name}: ${error.message}`);
  }
}

async function meetsLimit(what, reason, refusal, attempt) {
  try {
    await attempt();
    record(what, "fails", `was not refused, though: ${reason}`);
  } catch (error) {
    if (error instanceof refusal) record(what, "limit", reason);
    else record(what, "fails", `${error.name}: ${error.message}`);
  }
}

async function aborted() {
  const headers = { Authorization: `Bearer ${given.key}` };
  const text = await (await fetch(`${given.url}/metrics`, { headers })).text();
  const counts = text.matchAll(/^loraserve_requests_finished_total\{.*reason="abort".*\} (\S+)$/gm);
  return [...counts].reduce((sum, [, count]) => sum + Number(count), 0);
}

await tries("plain", async () => {
  const answer = await client.chat.completions.create({ model: "demo", messages: ASK, temperature: 0 });
  assert.equal(answer.choices[0].message.content, WORD);
});

await tries("stream", async () => {
  const stream = await client.chat.completions.create({
    model: "reverse",
    messages: ASK,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, REVERSED);
  assert.equal(usage.completion_tokens, WORD.length + 1);
});

await tries("chat.completions.stream", async () => {
  const runner = client.chat.completions.stream({ model: "upper", messages: ASK, temperature: 0 });
  assert.equal((await runner.finalChatCompletion()).choices[0].message.content, WORD.toUpperCase());
});

await tries("adapter", async () => {
  const answer = await client.chat.completions.create({ model: "reverse", messages: ASK, temperature: 0 });
  assert.equal(answer.choices[0].message.content, REVERSED);
});

await tries("error", async () => {
  await assert.rejects(
    client.chat.completions.create({ model: "missing", messages: ASK }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
});

await tries("a wrong key", async () => {
  const stranger = new OpenAI({ baseURL: `${given.url}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

await tries("batch", async () => {
  const prompt = [WORD, "planet"];
  const answer = await client.completions.create({ model: "demo", prompt, max_tokens: 4, echo: true });
  assert.deepEqual(answer.choices.map((choice, place) => choice.text.startsWith(prompt[place])), [true, true]);
});

await tries("logprobs", async () => {
  const answer = await client.chat.completions.create({
    model: "reverse",
    messages: ASK,
    temperature: 0,
    logprobs: true,
    top_logprobs: 2,
  });
  const tokens = answer.choices[0].logprobs.content;
  assert.equal(tokens.slice(0, WORD.length).map((each) => each.token).join(""), REVERSED);
  assert.ok(tokens.every((each) => each.top_logprobs.length === 2));
});

await tries("stop", async () => {
  const answer = await client.chat.completions.create({ model: "demo", messages: ASK, temperature: 0, stop: "d" });
  assert.equal(answer.choices[0].message.content, "gar");
});

await tries("cancel", async () => {
  const before = await aborted();
  const body = { model: "upper", prompt: WORD, max_tokens: LONG_TOKENS, stream: true, ignore_eos: true };
  const stream = await client.completions.create(body);
  for await (const _ of stream) break; // leaving the loop closes the connection
  for (let time = 0; time < 50 && (await aborted()) === before; time++) {
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  assert.ok((await aborted()) > before, "the server did not abort the request of the client that left");
});

await tries("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes("demo") && names.includes("reverse"));
});

await tries("a JSON schema", async () => {
  const form = { type: "json_schema", json_schema: { name: "city", schema: CITIES } };
  const answer = await client.chat.completions.parse({ model: "demo", messages: ASK, response_format: form });
  assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)), ["city"]);
});

await tries("runTools()", async () => {
  let asked = null;
  const weather = (given) => ((asked = given), "rain");
  const tool = { ...WEATHER, function: { ...WEATHER.function, function: weather, parse: JSON.parse } };
  const runner = client.chat.completions.runTools({
    model: "demo", messages: ASK, tools: [tool], tool_choice: { type: "function", function: { name: "weather" } },
  });
  await runner.done();
  assert.deepEqual(Object.keys(asked), ["city"]);
});

await meetsLimit("auto tools", "the embedded model's template has none", OpenAI.BadRequestError, () =>
  client.chat.completions.create({ model: "demo", messages: ASK, tools: [WEATHER] }),
);

writeFileSync(given.out, JSON.stringify({ version: "", tried }));
