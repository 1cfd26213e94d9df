"""The litellm library, with the server as an OpenAI-compatible provider and as a hosted vLLM."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
import json
from typing import Any

import litellm

from scripts.clients.probe import (
    CITIES,
    LONG_TOKENS,
    REVERSED,
    UPPER,
    WORD,
    Probe,
    answered_batch,
    batch_answers,
    batch_lines,
    expect,
    expect_usage,
    main,
)

ASK = [{"role": "user", "content": WORD}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITIES}}


def program(probe: Probe) -> None:
    """Try what the client offers."""
    server = {"api_base": probe.base_url, "api_key": probe.key, "num_retries": 0}
    answers(probe, server)
    streams(probe, server)
    errors(probe, server)
    with probe.tries("a batch of a file"):
        where = {"custom_llm_provider": "openai", "api_base": probe.base_url, "api_key": probe.key}
        file = litellm.create_file(file=("asked.jsonl", batch_lines()), purpose="batch", **where)
        made = litellm.create_batch(
            completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file.id, **where
        )
        done = answered_batch(lambda: litellm.retrieve_batch(batch_id=made.id, **where))
        content = litellm.file_content(file_id=done.output_file_id, **where).content
        expect(batch_answers(content), {"one": REVERSED, "two": UPPER})
    with probe.tries("a required tool"):
        asked = {"model": "openai/demo", "messages": ASK, "tools": [WEATHER], "tool_choice": "required"}
        answer = litellm.completion(**asked, **server)
        expect([call.function.name for call in answer.choices[0].message.tool_calls], ["weather"])
    with probe.tries("a JSON schema"):
        format_: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITIES}}
        answer = litellm.completion(model="openai/demo", messages=ASK, response_format=format_, **server)
        expect(list(json.loads(answer.choices[0].message.content)), ["city"])


def answers(probe: Probe, server: dict[str, Any]) -> None:
    """Ask for whole answers."""
    with probe.tries("plain"):
        answer = litellm.completion(model="openai/demo", messages=ASK, temperature=0, **server)
        expect(answer.choices[0].message.content, WORD)
    with probe.tries("adapter"):
        answer = litellm.completion(model="openai/reverse", messages=ASK, temperature=0, **server)
        expect(answer.choices[0].message.content, REVERSED)
        expect_usage(answer.usage.prompt_tokens, answer.usage.completion_tokens)
    with probe.tries("provider hosted_vllm"):
        answer = litellm.completion(model="hosted_vllm/upper", messages=ASK, temperature=0, **server)
        expect(answer.choices[0].message.content, UPPER)
    with probe.tries("a conversation sent back"):
        first = litellm.completion(model="openai/demo", messages=ASK, temperature=0, **server)
        so_far = [*ASK, first.choices[0].message.model_dump(), *ASK]
        litellm.completion(model="openai/demo", messages=so_far, max_tokens=8, **server)
    with probe.tries("batch"):
        found = litellm.batch_completion(
            model="openai/upper", messages=[ASK] * 4, temperature=0, max_tokens=16, **server
        )
        expect([answer.choices[0].message.content for answer in found], [UPPER] * 4)
    with probe.tries("text_completion of two prompts"):
        answer = litellm.text_completion(
            model="text-completion-openai/demo", prompt=[WORD, "planet"], max_tokens=4, **server
        )
        expect(len(answer.choices), 2)
    with probe.tries("logprobs"):
        answer = litellm.completion(
            model="openai/reverse", messages=ASK, temperature=0, logprobs=True, top_logprobs=2, **server
        )
        content = answer.choices[0].logprobs.content
        expect("".join(each.token for each in content[: len(WORD)]), REVERSED)
    with probe.tries("stop"):
        answer = litellm.completion(model="openai/demo", messages=ASK, temperature=0, stop=["d"], **server)
        expect(answer.choices[0].message.content, "gar")


def streams(probe: Probe, server: dict[str, Any]) -> None:
    """Ask for streams."""
    with probe.tries("stream"):
        stream = litellm.completion(
            model="openai/reverse",
            messages=ASK,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            **server,
        )
        chunks = list(stream)
        expect("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), REVERSED)
        usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)][-1]
        expect_usage(usage.prompt_tokens, usage.completion_tokens)
    with probe.tries("cancel"), probe.sees_abort():
        asyncio.run(left(server))


async def left(server: dict[str, Any]) -> None:
    """Read one chunk of a long stream, and close it."""
    stream: Any = await litellm.acompletion(
        model="openai/upper",
        messages=ASK,
        max_tokens=LONG_TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
        **server,
    )
    await anext(stream)
    await stream.aclose()


def errors(probe: Probe, server: dict[str, Any]) -> None:
    """Ask for what must fail: each has an exception of the client's own."""
    for what, model, messages, error in (
        ("error", "openai/missing", ASK, litellm.NotFoundError),
        ("a prompt that is too long", "openai/demo", [{"role": "user", "content": WORD * 1000}],
         litellm.ContextWindowExceededError),
    ):  # fmt: skip
        with probe.tries(what):
            try:
                litellm.completion(model=model, messages=messages, **server)
            except error as found:
                expect(type(found), error)
            else:
                raise AssertionError("it was answered")


if __name__ == "__main__":
    main(program)
