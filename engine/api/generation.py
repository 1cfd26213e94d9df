"""Run one GenerateRequest through an EngineClient, all prompts at once, and count what it took.

Each of OpenAI's two ways to ask for text is an Endpoint, with its way to read a body and to write an answer.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from engine.api.engine_client import EngineClient, OutputStreamClient
from engine.api.errors import ApiError
from engine.api.parsing import GenerateRequest, chat_request, completion_request
from engine.api.writers import ChatWriter, CompletionWriter
from engine.tokenizer import Delta, Tokenizer
from scheduler.step import RequestRefused


class Generation:
    """`submit` every prompt, or raise and leave none behind; iterate once for (choice index, Delta), where choices
    count over the prompts and then over `n`; `aclose` whatever happened."""

    def __init__(self, desk: EngineClient, ask: GenerateRequest, response_id: str) -> None:
        self._desk = desk
        self._ask = ask
        self.response_id = response_id
        self._streams: list[OutputStreamClient] = []
        self._merged: AsyncGenerator[tuple[int, Delta], None] | None = None
        self._output_tokens = 0

    async def submit(self) -> None:
        """Hand every prompt to the desk. Raises what EngineClient.submit raises."""
        try:
            for number, prompt in enumerate(self._ask.prompts):
                request_id = f"{self.response_id}-{number}"
                stream = await self._desk.submit(self._ask.model, prompt, self._ask.params, request_id)
                self._streams.append(stream)
        except BaseException:
            await self.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        n = self._ask.params.n
        self._merged = _merged(self._streams)
        async for number, delta in self._merged:
            self._output_tokens += len(delta.token_ids)
            yield number * n + delta.index, delta

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object for what was generated so far."""
        prompt_tokens = sum(map(len, self._ask.prompts))
        output_tokens = 0 if self._ask.silent else self._output_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in self._streams)},
        }

    async def aclose(self) -> None:
        """Abort what still runs."""
        if self._merged is not None:
            await self._merged.aclose()
        for stream in self._streams:
            await stream.aclose()


def joined(deltas: Sequence[Delta]) -> Delta:
    """One sequence's Deltas, all of them, as one."""
    last = deltas[-1]
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


async def _merged(streams: Sequence[OutputStreamClient]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(stream number, Delta) of all streams as they come; the first error ends them all."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | int] = asyncio.Queue()

    async def forward(number: int) -> None:
        try:
            async for delta in streams[number]:
                arrived.put_nowait((number, delta))
        finally:
            arrived.put_nowait(number)

    tasks = [asyncio.create_task(forward(number)) for number in range(len(streams))]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, int):
                running -= 1
                await tasks[item]
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class AnswerWriter(Protocol):
    """Turns what was generated into the `choices` of one endpoint."""

    @property
    def chunk_object(self) -> str: ...
    @property
    def whole_object(self) -> str: ...
    def opening(self) -> tuple[dict[str, object], ...]: ...
    def part(self, choice: int, delta: Delta) -> dict[str, object] | None: ...
    def whole(self, choice: int, delta: Delta) -> dict[str, object]: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to ask: `read` turns a body into a GenerateRequest, `writer` makes the AnswerWriter of its answer.

    Ids begin with `prefix`; `asked_in` is the field that holds what is to be continued.
    """

    prefix: str
    asked_in: str
    read: Callable[[bytes, EngineClient], GenerateRequest]
    writer: Callable[[GenerateRequest, Tokenizer], AnswerWriter]

    def reply(self, desk: EngineClient, ask: GenerateRequest) -> "Reply":
        """The answer to `ask`, not begun yet."""
        generation = Generation(desk, ask, f"{self.prefix}-{uuid.uuid4().hex}")
        return Reply(self, ask, generation, self.writer(ask, desk.codec))


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": Endpoint("cmpl", "prompt", completion_request, CompletionWriter),
    "/v1/chat/completions": Endpoint("chatcmpl", "messages", chat_request, ChatWriter),
}


class Reply:
    """One answer, whole or in chunks. Use as `async with`: entering submits every prompt or raises and leaves none
    behind; leaving aborts what still runs, whatever the reason."""

    def __init__(
        self, endpoint: Endpoint, ask: GenerateRequest, generation: Generation, writer: AnswerWriter
    ) -> None:
        self._endpoint = endpoint
        self._generation = generation
        self._ask = ask
        self._writer = writer
        self._head: dict[str, object] = {
            "id": generation.response_id,
            "created": int(time.time()),
            "model": ask.model,
        }

    async def __aenter__(self) -> "Reply":
        try:
            await self._generation.submit()
        except RequestRefused as error:
            raise ApiError(400, str(error), self._endpoint.asked_in, "context_length_exceeded") from None
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._generation.aclose()

    async def whole(self) -> dict[str, object]:
        """The response object, when everything is generated."""
        by_choice: dict[int, list[Delta]] = {}
        async for choice, delta in self._generation:
            by_choice.setdefault(choice, []).append(delta)
        choices = [self._writer.whole(choice, joined(by_choice[choice])) for choice in sorted(by_choice)]
        head = self._head | {"object": self._writer.whole_object}
        return head | {"choices": choices, "usage": self._generation.usage()}

    async def chunks(self) -> AsyncIterator[dict[str, object]]:
        """The chunk objects of a stream, as they come; the first ones not before the engine's first word, so
        that what fails until then is still answered with a status of its own."""
        opened = False
        async for choice, delta in self._generation:
            if not opened:
                opened = True
                for entry in self._writer.opening():
                    yield self._chunk(entry)
            if (entry := self._writer.part(choice, delta)) is not None:
                yield self._chunk(entry)
        if self._ask.include_usage:
            head = self._head | {"object": self._writer.chunk_object}
            yield head | {"choices": [], "usage": self._generation.usage()}

    def _chunk(self, entry: dict[str, object]) -> dict[str, object]:
        usage = {"usage": None} if self._ask.include_usage else {}
        return self._head | {"object": self._writer.chunk_object, "choices": [entry]} | usage
