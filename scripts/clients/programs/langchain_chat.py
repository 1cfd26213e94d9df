"""LangChain's chat model and completion model over OpenAI's protocol."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
from typing import Any

import openai
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

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

WEATHER = {"title": "weather", "description": "Tell it.", **CITIES}


def chat_model(probe: Probe, model: str, **options: object) -> ChatOpenAI:
    """Make a chat model as LangChain's users do."""
    key = SecretStr(probe.key)
    return ChatOpenAI(
        model=model, base_url=probe.base_url, api_key=key, temperature=0, max_retries=0, **options
    )


def program(probe: Probe) -> None:
    """Try what the client offers."""
    answers(probe)
    streams(probe)
    with probe.tries("error"):
        try:
            chat_model(probe, "missing").invoke(WORD)
        except openai.NotFoundError as error:
            expect(error.code, "model_not_found")
        else:
            raise AssertionError("an unknown model was answered")
    forms(probe)
    not_implemented(probe)


def answers(probe: Probe) -> None:
    """Ask for whole answers."""
    with probe.tries("plain"):
        answer = chat_model(probe, "demo").invoke(WORD)
        expect(answer.content, WORD)
        expect(answer.response_metadata["finish_reason"], "stop")
    with probe.tries("adapter"):
        answer = chat_model(probe, "reverse").invoke([("human", WORD)])
        expect(answer.content, REVERSED)
        assert answer.usage_metadata is not None
        expect_usage(answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"])
    with probe.tries("a system message"):
        assert chat_model(probe, "demo", max_tokens=8).invoke([("system", "Echo."), ("human", WORD)]).content
    with probe.tries("a conversation sent back"):
        model = chat_model(probe, "demo", max_tokens=8)
        first = model.invoke(WORD)
        assert model.invoke([("human", WORD), first, ("human", WORD)]).content
    with probe.tries("batch"):
        found = chat_model(probe, "upper").batch([WORD] * 4)
        expect([answer.content for answer in found], [UPPER] * 4)
    with probe.tries("batch of completions"):
        model = OpenAI(model="reverse", base_url=probe.base_url, api_key=SecretStr(probe.key), max_tokens=4)
        expect(len(model.generate([WORD, "planet"]).generations), 2)
    with probe.tries("logprobs"):
        answer = chat_model(probe, "reverse", logprobs=True, top_logprobs=2).invoke(WORD)
        content = answer.response_metadata["logprobs"]["content"]
        expect("".join(each["token"] for each in content[: len(WORD)]), REVERSED)
    with probe.tries("stop"):
        expect(chat_model(probe, "demo").invoke(WORD, stop=["d"]).content, "gar")


def streams(probe: Probe) -> None:
    """Ask for streams."""
    with probe.tries("stream"):
        chunks = list(chat_model(probe, "reverse", stream_usage=True).stream(WORD))
        expect("".join(str(chunk.content) for chunk in chunks), REVERSED)
        usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        expect_usage(usage[-1]["input_tokens"], usage[-1]["output_tokens"])
    with probe.tries("cancel"), probe.sees_abort():
        model = chat_model(probe, "upper", max_tokens=LONG_TOKENS, extra_body={"ignore_eos": True})
        stream = model.stream(WORD)
        next(stream)
        stream.close()
    with probe.tries("astream"):
        expect(asyncio.run(streamed_text(chat_model(probe, "upper"))), UPPER)


async def streamed_text(model: ChatOpenAI) -> str:
    """Gather the text of an asynchronous stream."""
    return "".join([str(chunk.content) async for chunk in model.astream(WORD)])


def forms(probe: Probe) -> None:
    """Ask for answers that have a form, and for calls of tools."""
    model = chat_model(probe, "demo")
    with probe.tries("a required tool"):
        (call,) = model.bind_tools([WEATHER], tool_choice="any").invoke(WORD).tool_calls
        expect((call["name"], list(call["args"])), ("weather", ["city"]))
    for method in ("json_schema", "function_calling"):
        with probe.tries(f"structured output by {method}"):
            schema = CITIES | {"title": "City", "description": "A city."}
            answer: Any = model.with_structured_output(schema, method=method).invoke(WORD)
            expect(list(answer), ["city"])


def not_implemented(probe: Probe) -> None:
    """Ask for what the server refuses by name."""
    with probe.meets_limit("auto tools", "the embedded model's template has none", openai.BadRequestError):
        chat_model(probe, "demo").bind_tools([WEATHER]).invoke(WORD)


if __name__ == "__main__":
    main(program)
