"""The proxy of litellm in front of the server, asked by OpenAI's client."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
from openai import OpenAI

from scripts.clients.probe import (
    CITIES,
    LONG_TOKENS,
    REVERSED,
    UPPER,
    WORD,
    Probe,
    expect,
    expect_usage,
    main,
)

ASK: Any = [{"role": "user", "content": WORD}]
MODEL = """\
  - model_name: {name}
    litellm_params: {{model: "openai/{name}", api_base: "{url}", api_key: "{key}"}}
"""
PROXY_KEY = "sk-of-the-proxy"
START_S = 180


def program(probe: Probe) -> None:
    """Start the proxy, and try what passes through it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        probe.tries("the proxy starts"),
        started(probe, Path(folder)) as url,
        OpenAI(base_url=url, api_key=PROXY_KEY, max_retries=0) as client,
    ):
        through(probe, client)


@contextmanager
def started(probe: Probe, folder: Path) -> Generator[str, None, None]:
    """Run the proxy on a free port, with the server's models; it ends with the block."""
    names = ("demo", "reverse", "upper", "missing")
    models = [MODEL.format(name=name, url=probe.base_url, key=probe.key) for name in names]
    config = folder / "config.yaml"
    config.write_text(f"model_list:\n{''.join(models)}general_settings: {{master_key: {PROXY_KEY}}}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("litellm")
    arguments = ("--config", config, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    process = subprocess.Popen([command, *arguments], env=dict(os.environ), cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        wait(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the proxy answers. Raises RuntimeError if it ends, or does not in time."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            urlopen(f"{url}/health/liveliness", timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise RuntimeError("the proxy did not start")


def through(probe: Probe, client: OpenAI) -> None:
    """Ask by way of the proxy."""
    chat = client.chat.completions
    with probe.tries("plain"):
        expect(chat.create(model="demo", messages=ASK, temperature=0).choices[0].message.content, WORD)
    with probe.tries("adapter"):
        answer = chat.create(model="reverse", messages=ASK, temperature=0)
        expect(answer.choices[0].message.content, REVERSED)
    with probe.tries("stream"):
        stream = chat.create(
            model="upper", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        expect("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), UPPER)
        usage = chunks[-1].usage
        assert usage is not None
        expect_usage(usage.prompt_tokens, usage.completion_tokens)
    with probe.tries("logprobs"):
        answer = chat.create(model="reverse", messages=ASK, temperature=0, logprobs=True, top_logprobs=2)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        expect("".join(each.token for each in (logprobs.content or [])[: len(WORD)]), REVERSED)
    with probe.tries("stop"):
        answer = chat.create(model="demo", messages=ASK, temperature=0, stop=["d"])
        expect(answer.choices[0].message.content, "gar")
    with probe.tries("batch"):
        answer = client.completions.create(model="demo", prompt=[WORD, "planet"], max_tokens=4)
        expect(len(answer.choices), 2)
    with probe.tries("cancel"), probe.sees_abort():
        body = {"ignore_eos": True}
        left = chat.create(model="upper", messages=ASK, max_tokens=LONG_TOKENS, stream=True, extra_body=body)
        next(iter(left))
        left.close()
    with probe.tries("error"):
        try:
            chat.create(model="missing", messages=ASK)
        except openai.NotFoundError as error:
            expect("missing" in str(error), True)
        else:
            raise AssertionError("an unknown model was answered")
    with probe.tries("a required tool"):
        weather: Any = {"type": "function", "function": {"name": "weather", "parameters": CITIES}}
        answer: Any = chat.create(model="demo", messages=ASK, tools=[weather], tool_choice="required")
        expect([call.function.name for call in answer.choices[0].message.tool_calls], ["weather"])


if __name__ == "__main__":
    main(program)
