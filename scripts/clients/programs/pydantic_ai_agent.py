"""Pydantic AI's agents over its model for OpenAI's chat API."""
# pyright: basic, reportMissingImports=false
# The client is installed where this runs.

import asyncio
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelNotFoundError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

from scripts.clients.probe import LONG_TOKENS, REVERSED, UPPER, WORD, Probe, expect, expect_usage, main


class Colour(BaseModel):
    """What a structured answer holds."""

    name: Literal["red", "green"]


def agent_of(probe: Probe, model: str, **settings: object) -> Agent:
    """Make an agent as the library's users do."""
    provider = OpenAIProvider(base_url=probe.base_url, api_key=probe.key)
    chosen = OpenAIChatModelSettings(temperature=0, **settings)
    return Agent(OpenAIChatModel(model, provider=provider, settings=chosen))


def program(probe: Probe) -> None:
    """Try what the client offers."""
    with probe.tries("plain"):
        expect(agent_of(probe, "demo").run_sync(WORD).output, WORD)
    with probe.tries("adapter"):
        result = agent_of(probe, "reverse").run_sync(WORD)
        expect(result.output, REVERSED)
        expect_usage(result.usage.input_tokens, result.usage.output_tokens)
    with probe.tries("a conversation sent back"):
        agent = agent_of(probe, "demo", max_tokens=8)
        first = agent.run_sync(WORD)
        assert agent.run_sync(WORD, message_history=first.all_messages()).output
    with probe.tries("logprobs"):
        settings = {"openai_logprobs": True, "openai_top_logprobs": 2}
        result = agent_of(probe, "reverse", **settings).run_sync(WORD)
        details = result.all_messages()[-1].provider_details
        expect("".join(each["token"] for each in details["logprobs"][: len(WORD)]), REVERSED)
    with probe.tries("stop"):
        expect(agent_of(probe, "demo", stop_sequences=["d"]).run_sync(WORD).output, "gar")
    with probe.tries("stream"):
        asyncio.run(streamed(probe))
    with probe.tries("cancel"), probe.sees_abort():
        asyncio.run(left(probe))
    with probe.tries("batch"):
        expect(asyncio.run(at_once(probe)), [UPPER] * 4)
    with probe.tries("error"):
        try:
            agent_of(probe, "missing").run_sync(WORD)
        except ModelNotFoundError as error:
            expect(error.status_code, 404)
        else:
            raise AssertionError("an unknown model was answered")
    forms(probe)


def forms(probe: Probe) -> None:
    """Ask for answers that have a form, by a tool and by the response's format."""
    agent = agent_of(probe, "demo")
    with probe.tries("an output by a tool"):
        expect(agent.run_sync(WORD, output_type=Colour).output.name in ("red", "green"), True)
    with probe.tries("an output by a JSON schema"):
        output = agent.run_sync(WORD, output_type=NativeOutput(Colour)).output
        expect(output.name in ("red", "green"), True)


async def streamed(probe: Probe) -> None:
    """Read a stream to its end, and its usage."""
    async with agent_of(probe, "reverse").run_stream(WORD) as result:
        texts = [text async for text in result.stream_text(delta=True, debounce_by=None)]
        expect("".join(texts), REVERSED)
        expect_usage(result.usage.input_tokens, result.usage.output_tokens)


async def left(probe: Probe) -> None:
    """Read one part of a long stream, and leave it."""
    agent = agent_of(probe, "upper", max_tokens=LONG_TOKENS, extra_body={"ignore_eos": True})
    async with agent.run_stream(WORD) as result:
        await anext(aiter(result.stream_text(delta=True, debounce_by=None)))
        await result.cancel()


async def at_once(probe: Probe) -> list[str]:
    """Run four agents at once."""
    found = await asyncio.gather(*(agent_of(probe, "upper").run(WORD) for _ in range(4)))
    return [result.output for result in found]


if __name__ == "__main__":
    main(program)
