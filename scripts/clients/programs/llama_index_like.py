"""LlamaIndex's OpenAILike, with chat and with completions."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
import gc
import json

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

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

ASK = [ChatMessage(role="user", content=WORD)]


def language_model(probe: Probe, model: str, *, chat: bool = True, **options: object) -> OpenAILike:
    """Make a model as LlamaIndex's users do."""
    server = {"api_base": probe.base_url, "api_key": probe.key, "max_retries": 0}
    return OpenAILike(
        model=model, temperature=0, is_chat_model=chat, context_window=2048, **server, **options
    )


def program(probe: Probe) -> None:
    """Try what the client offers."""
    answers(probe)
    streams(probe)
    with probe.tries("error"):
        try:
            language_model(probe, "missing").chat(ASK)
        except openai.NotFoundError as error:
            expect(error.code, "model_not_found")
        else:
            raise AssertionError("an unknown model was answered")
    with probe.tries("a JSON schema"):
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITIES}}
        answer = language_model(probe, "demo").chat(ASK, response_format=form)
        expect(list(json.loads(answer.message.content or "")), ["city"])


def answers(probe: Probe) -> None:
    """Ask for whole answers."""
    with probe.tries("plain"):
        expect(language_model(probe, "demo").chat(ASK).message.content, WORD)
    with probe.tries("adapter"):
        answer = language_model(probe, "reverse").chat(ASK)
        expect(answer.message.content, REVERSED)
        usage = answer.additional_kwargs
        expect_usage(usage["prompt_tokens"], usage["completion_tokens"])
    with probe.tries("complete() over chat"):
        expect(language_model(probe, "upper").complete(WORD).text, UPPER)
    with probe.tries("completions"):
        answer = language_model(probe, "upper", chat=False, max_tokens=4).complete(WORD)
        assert answer.text
    with probe.tries("a conversation sent back"):
        model = language_model(probe, "demo", max_tokens=8)
        first = model.chat(ASK).message
        assert model.chat([*ASK, first, *ASK]).message.content
    with probe.tries("logprobs"):
        answer = language_model(probe, "reverse", logprobs=True, top_logprobs=2).chat(ASK)
        best = [each[0].token for each in answer.logprobs or []]
        expect("".join(best[: len(WORD)]), REVERSED)
    with probe.tries("stop"):
        expect(language_model(probe, "demo").chat(ASK, stop=["d"]).message.content, "gar")
    with probe.tries("batch"):
        expect(asyncio.run(at_once(language_model(probe, "upper"))), [UPPER] * 4)


async def at_once(model: OpenAILike) -> list[str | None]:
    """Ask four times at once."""
    found = await asyncio.gather(*(model.achat(ASK) for _ in range(4)))
    return [answer.message.content for answer in found]


def streams(probe: Probe) -> None:
    """Ask for streams."""
    with probe.tries("stream"):
        usage_too = {"stream_options": {"include_usage": True}}
        chunks = list(language_model(probe, "reverse", additional_kwargs=usage_too).stream_chat(ASK))
        expect(chunks[-1].message.content, REVERSED)
        usage = chunks[-1].additional_kwargs
        expect_usage(usage["prompt_tokens"], usage["completion_tokens"])
    with probe.tries("cancel"), probe.sees_abort():
        body = {"extra_body": {"ignore_eos": True}}
        model = language_model(probe, "upper", chat=False, max_tokens=LONG_TOKENS, additional_kwargs=body)
        stream = model.stream_complete(WORD)
        next(stream)
        del stream
        gc.collect()  # what the library keeps of a stream is a cycle: until then the connection stays open


if __name__ == "__main__":
    main(program)
