"""OpenAI's own client for Python."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
import json
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

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

ASK: Any = [{"role": "user", "content": WORD}]
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITIES}}


class Colour(BaseModel):
    """What a structured answer holds."""

    name: Literal["red", "green"]


def program(probe: Probe) -> None:
    """Try what the client offers."""
    with OpenAI(base_url=probe.base_url, api_key=probe.key, max_retries=0) as client:
        whole(probe, client)
        streamed(probe, client)
        completions(probe, client)
        errors(probe, client)
        forms(probe, client)
        batches(probe, client)
        not_implemented(probe, client)
    with probe.tries("8 at once with asyncio"):
        answers = asyncio.run(at_once(probe))
        expect(answers, [REVERSED, UPPER] * 4)


def batches(probe: Probe, client: OpenAI) -> None:
    """Have a file answered."""
    with probe.tries("a batch of a file"):
        file = client.files.create(file=("asked.jsonl", batch_lines()), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        expect(answered_batch(lambda: client.batches.retrieve(made.id)).status, "completed")
        found = client.batches.retrieve(made.id).output_file_id
        assert found is not None
        expect(batch_answers(client.files.content(found).content), {"one": REVERSED, "two": UPPER})
        expect([each.id for each in client.batches.list()], [made.id])
        expect(client.files.delete(file.id).deleted, True)


def whole(probe: Probe, client: OpenAI) -> None:
    """Ask for whole answers."""
    chat = client.chat.completions
    with probe.tries("plain"):
        answer = chat.create(model="demo", messages=ASK, temperature=0)
        expect(answer.choices[0].message.content, WORD)
        expect(answer.choices[0].finish_reason, "stop")
    with probe.tries("adapter"):
        answer = chat.create(model="reverse", messages=ASK, temperature=0, seed=1, user="somebody")
        expect(answer.choices[0].message.content, REVERSED)
    with probe.tries("logprobs"):
        answer = chat.create(model="reverse", messages=ASK, temperature=0, logprobs=True, top_logprobs=2)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        expect("".join(each.token for each in logprobs.content[: len(WORD)]), REVERSED)
        expect({len(each.top_logprobs) for each in logprobs.content}, {2})
    with probe.tries("stop"):
        answer = chat.create(model="demo", messages=ASK, temperature=0, stop=["d"])
        expect(answer.choices[0].message.content, "gar")
    with probe.tries("n"):
        answer = chat.create(model="reverse", messages=ASK, temperature=0, n=3)
        expect([choice.message.content for choice in answer.choices], [REVERSED] * 3)
    with probe.tries("a conversation sent back"):
        first = chat.create(model="demo", messages=ASK, temperature=0).choices[0].message
        so_far: Any = [*ASK, first, *ASK]
        again = chat.create(model="demo", messages=so_far, temperature=0, max_tokens=8)
        assert again.choices[0].message.content
    with probe.tries("models"):
        assert {"demo", "reverse", "upper"} <= {model.id for model in client.models.list()}
        expect(client.models.retrieve("reverse").id, "reverse")


def streamed(probe: Probe, client: OpenAI) -> None:
    """Ask for streams: one with usage, one by the client's stream helper, one that is left."""
    with probe.tries("stream"):
        stream = client.chat.completions.create(
            model="reverse", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        expect("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), REVERSED)
        usage = chunks[-1].usage
        assert usage is not None
        expect_usage(usage.prompt_tokens, usage.completion_tokens)
    with (
        probe.tries("chat.completions.stream"),
        client.chat.completions.stream(model="upper", messages=ASK, temperature=0) as events,
    ):
        expect(events.get_final_completion().choices[0].message.content, UPPER)
    with probe.tries("cancel"), probe.sees_abort():
        left = client.completions.create(
            model="upper",
            prompt=WORD,
            max_tokens=LONG_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(left))
        left.close()


def completions(probe: Probe, client: OpenAI) -> None:
    """Ask for completions of several prompts, as texts and as tokens."""
    with probe.tries("batch"):
        answer = client.completions.create(model="reverse", prompt=[WORD, "planet"], max_tokens=4, echo=True)
        expect([choice.text.startswith(text) for choice, text in zip(answer.choices, (WORD, "planet"), strict=True)],
               [True, True])  # fmt: skip
    with probe.tries("completion logprobs"):
        answer = client.completions.create(
            model="upper", prompt=WORD, max_tokens=2, logprobs=2, temperature=0
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        expect(len(logprobs.token_logprobs or []), 2)
        expect({len(each) for each in logprobs.top_logprobs or []}, {2})
    with probe.tries("token ids as prompts"):
        answer = client.completions.create(model="upper", prompt=[[5, 6, 7], [8, 9]], max_tokens=4)
        expect(len(answer.choices), 2)


def errors(probe: Probe, client: OpenAI) -> None:
    """Ask for what must fail: each has an exception of the client's own."""
    with probe.tries("error"):
        try:
            client.chat.completions.create(model="missing", messages=ASK)
        except openai.NotFoundError as error:
            expect((error.code, error.param), ("model_not_found", "model"))
        else:
            raise AssertionError("an unknown model was answered")
    with probe.tries("a wrong key"):
        try:
            client.with_options(api_key="wrong").models.list()
        except openai.AuthenticationError as error:
            expect(error.status_code, 401)
        else:
            raise AssertionError("a wrong key was taken")
    with probe.tries("a prompt that is too long"):
        try:
            client.completions.create(model="demo", prompt=WORD * 1000)
        except openai.BadRequestError as error:
            expect(error.code, "context_length_exceeded")
        else:
            raise AssertionError("a prompt beyond the model's length was taken")


def forms(probe: Probe, client: OpenAI) -> None:
    """Ask for answers that have a form, and for calls of tools."""
    chat = client.chat.completions
    one: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    with probe.tries("parse() into a class"):
        parsed = chat.parse(model="demo", messages=ASK, response_format=Colour).choices[0].message.parsed
        expect(parsed is not None and parsed.name in ("red", "green"), True)
    with probe.tries("a required tool"):
        answer: Any = chat.create(model="demo", messages=ASK, **one)
        (call,) = answer.choices[0].message.tool_calls
        expect((call.function.name, list(json.loads(call.function.arguments))), ("weather", ["city"]))
        sent_back = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        so_far: Any = [*ASK, answer.choices[0].message, sent_back]
        chat.create(model="demo", messages=so_far, tools=[WEATHER], tool_choice="none", max_tokens=8)
    with probe.tries("a required tool in a stream"):
        stream = chat.create(model="demo", messages=ASK, tools=[WEATHER], tool_choice="required", stream=True)
        calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
        arguments = "".join(call.function.arguments or "" for call in calls if call.function is not None)
        expect(list(json.loads(arguments)), ["city"])


def not_implemented(probe: Probe, client: OpenAI) -> None:
    """Ask for what the server refuses by name."""
    with probe.meets_limit("auto tools", "the embedded model's template has none", openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=ASK, tools=[WEATHER])
    with probe.meets_limit("responses", "/v1/responses is not implemented", openai.NotFoundError):
        client.responses.create(model="demo", input=WORD)
    with probe.meets_limit("embeddings", "/v1/embeddings is not implemented", openai.NotFoundError):
        client.embeddings.create(model="demo", input=WORD)


async def at_once(probe: Probe) -> list[str | None]:
    """Ask two adapters in turn, all at once."""
    async with AsyncOpenAI(base_url=probe.base_url, api_key=probe.key, max_retries=0) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=model, messages=ASK, temperature=0)
                for model in ["reverse", "upper"] * 4
            )
        )
    return [answer.choices[0].message.content for answer in answers]


if __name__ == "__main__":
    main(program)
