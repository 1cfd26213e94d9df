"""Endpoints: OpenAI's two ways to ask for text, each with its way to read a body and to write an answer."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from engine.api.chat import ChatWriter
from engine.api.completions import CompletionWriter
from engine.api.desk import Desk
from engine.api.errors import ApiError
from engine.api.generation import Generation, joined
from engine.api.openai import Ask, chat_ask, completion_ask
from engine.text import Delta, TextCodec
from scheduler.step import RequestRefused


class Writer(Protocol):
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
    """`read` turns a body into an Ask, `writer` makes the Writer of its answer; ids begin with `prefix`, and
    `asked_in` is the field that holds what is to be continued."""

    prefix: str
    asked_in: str
    read: Callable[[bytes, Desk], Ask]
    writer: Callable[[Ask, TextCodec], Writer]

    def reply(self, desk: Desk, ask: Ask) -> "Reply":
        """The answer to `ask`, not begun yet."""
        generation = Generation(desk, ask, f"{self.prefix}-{uuid.uuid4().hex}")
        return Reply(self, ask, generation, self.writer(ask, desk.codec))


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": Endpoint("cmpl", "prompt", completion_ask, CompletionWriter),
    "/v1/chat/completions": Endpoint("chatcmpl", "messages", chat_ask, ChatWriter),
}


class Reply:
    """One answer, whole or in chunks. Use as `async with`: entering submits every prompt or raises and leaves none
    behind; leaving aborts what still runs, whatever the reason."""

    def __init__(self, endpoint: Endpoint, ask: Ask, generation: Generation, writer: Writer) -> None:
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
