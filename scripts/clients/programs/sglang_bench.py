"""The requests of SGLang's bench_serving in its OpenAI modes, replayed, and its way to read the streams.

The client itself is not run: its module imports SGLang's runtime, gigabytes of it. The payloads are those of release
0.5.23, `sglang/benchmark/serving.py`, with its defaults.
"""

import json
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from scripts.clients.probe import REVERSED, UPPER, WORD, Probe, expect, main

RELEASE = "0.5.23"
OUTPUT_TOKENS = 7


def completion(model: str, **extra: object) -> dict[str, Any]:
    """Write what mode `sglang-oai` sends."""
    common = {
        "best_of": 1,
        "max_tokens": OUTPUT_TOKENS,
        "stream": True,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    return {"model": model, "prompt": WORD, **common, **extra}


def chat(model: str, **extra: object) -> dict[str, Any]:
    """Write what mode `sglang-oai-chat` sends."""
    messages = [{"role": "user", "content": WORD}]
    common = {"max_completion_tokens": OUTPUT_TOKENS, "stream": True, "temperature": 0.0, "ignore_eos": False}
    return {"model": model, "messages": messages, **common, **extra}


def program(probe: Probe) -> None:
    """Send every kind of request that the client makes."""
    probe.version = RELEASE
    with probe.tries("plain"):
        expect(chat_text(events(probe, "chat/completions", chat("demo"))), WORD)
    with probe.tries("stream"):
        found = list(events(probe, "completions", completion("demo")))
        assert all("text" in each["choices"][0] for each in found)
        expect(len([each for each in found if each["choices"][0]["text"]]) > 1, True)
    with probe.tries("adapter"):
        body = chat("reverse", lora_path="reverse")  # --lora-name sends both
        expect(chat_text(events(probe, "chat/completions", body)), REVERSED)
    with probe.tries("an adapter for completions"):
        assert list(events(probe, "completions", completion("upper", lora_path="upper")))
    with probe.tries("--extra-request-body"):
        body = chat("upper", top_p=0.95, top_k=20, stream_options={"include_usage": True})
        expect(chat_text(events(probe, "chat/completions", body)), UPPER)
    with probe.tries("logprobs"):
        for each in events(probe, "completions", completion("upper", logprobs=2)):
            assert each["choices"][0]["logprobs"]["top_logprobs"]
    with (
        probe.tries("--disable-stream"),
        ask(probe, "completions", completion("upper", stream=False)) as response,
    ):
        expect(json.load(response)["usage"]["completion_tokens"], OUTPUT_TOKENS)
    with probe.tries("error"):
        try:
            ask(probe, "chat/completions", chat("missing")).close()
        except HTTPError as error:
            expect(error.code, 404)
        else:
            raise AssertionError("an unknown model was answered")
    with probe.meets_limit("/generate", "/generate, SGLang's own API, is not implemented", HTTPError):
        body = {"text": WORD, "sampling_params": {"temperature": 0.0, "max_new_tokens": 4}}
        ask(probe, "../generate", body).close()


def ask(probe: Probe, path: str, body: dict[str, Any]) -> HTTPResponse:
    """Send a body. Raises HTTPError."""
    headers = {"Authorization": f"Bearer {probe.key}", "Content-Type": "application/json"}
    address = f"{probe.url}/{path[3:]}" if path.startswith("../") else f"{probe.base_url}/{path}"
    return urlopen(Request(address, json.dumps(body).encode(), headers), timeout=120)


def events(probe: Probe, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read a stream line by line, as the client does: what follows `data: ` is JSON or [DONE]."""
    ended = False
    with ask(probe, path, body) as response:
        for line in response:
            chunk = line.strip().decode().removeprefix("data: ")
            ended |= chunk == "[DONE]"
            if chunk and chunk != "[DONE]":
                yield json.loads(chunk)
    expect(ended, True)


def chat_text(stream: Iterator[dict[str, Any]]) -> str:
    """Gather the text of a chat stream; a chunk of usage alone has no choice."""
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in stream if each["choices"])


if __name__ == "__main__":
    main(program)
