"""DeltaStream: one request's answer on its way from the step loop's events to whoever awaits it.

It may not know the engine: what it is handed it hands on, and `withdraw` is how its reader gives the rest up.
"""

import asyncio
from collections.abc import Callable

from engine.answer import Answer
from engine.errors import EngineError
from engine.text import Delta


class DeltaStream:
    """The answer to one request as it comes: Deltas of all its sequences, interleaved.

    Iterate to the end, or `aclose()` to abort what still runs. Raises EngineError if the engine gave up.
    """

    def __init__(self, answer: Answer, adapter_name: str, withdraw: Callable[[str], None]) -> None:
        self.answer = answer
        self.adapter_name = adapter_name
        self._withdraw = withdraw
        self._queue: asyncio.Queue[Delta | EngineError | None] = asyncio.Queue()
        self._last_s: dict[int, float] = {}

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache supplied, known from the first Delta on."""
        return self.answer.cached_tokens

    def __aiter__(self) -> "DeltaStream":
        return self

    async def __anext__(self) -> Delta:
        item = await self._queue.get()
        if isinstance(item, Delta):
            return item
        self._queue.put_nowait(None)  # whoever asks again finds the end again
        if item is None:
            raise StopAsyncIteration
        raise item

    async def aclose(self) -> None:
        """Abort the sequences that still run; their blocks and adapter are free once this returns."""
        if self.answer.open:
            self.answer.close()
            self._withdraw(self.answer.request.request_id)
            self._queue.put_nowait(None)

    def put(self, delta: Delta) -> None:
        """Hand over one Delta, and the end after the last."""
        self._queue.put_nowait(delta)
        if not self.answer.open:
            self._queue.put_nowait(None)

    def fail(self, error: EngineError) -> None:
        """End the stream with an error."""
        self.answer.close()
        self._queue.put_nowait(error)

    def elapsed_s(self, index: int, now_s: float) -> tuple[bool, float]:
        """Whether this is the sequence's first token, and seconds since its last one (or its submission)."""
        last_s = self._last_s.get(index)
        self._last_s[index] = now_s
        return last_s is None, now_s - (self.answer.request.arrival_s if last_s is None else last_s)
