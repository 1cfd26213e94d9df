"""Turn a request's token events into its answers, and hand them to whoever awaits them.

RequestOutput serves the server and offline use alike; OutputStream adds the event loop.
"""

import asyncio
from collections.abc import Callable

from engine.errors import EngineError
from engine.tokenizer import Delta, Detokenizer, Tokenizer
from scheduler.plan import TokenEvent
from scheduler.request import Request


class RequestOutput:
    """Turns a request's TokenEvents into Deltas and knows which of its sequences still run."""

    def __init__(self, request: Request, codec: Tokenizer) -> None:
        self.request = request
        self.cached_tokens = 0
        self.output_tokens = 0
        self._texts = {index: Detokenizer(codec, request.params) for index in range(request.params.n)}

    @property
    def open(self) -> bool:
        """True while a sequence still runs."""
        return bool(self._texts)

    def close(self) -> None:
        """Take in nothing more."""
        self._texts.clear()

    def push(self, event: TokenEvent) -> Delta | None:
        """The Delta of an event; None if the sequence's text had ended before it.

        If the Delta ends the sequence and the event does not, a stop string was met: the core must be told.
        """
        text = self._texts.get(event.key.index)
        if text is None:
            return None
        delta = text.push(event)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self.output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            del self._texts[event.key.index]
        return delta


class OutputStream:
    """The answer to one request as it comes: Deltas of all its sequences, interleaved.

    Iterate to the end, or `aclose()` to abort what still runs. Raises EngineError if the engine gave up.
    """

    def __init__(self, answer: RequestOutput, adapter_name: str, withdraw: Callable[[str], None]) -> None:
        self.answer = answer
        self.adapter_name = adapter_name
        self._withdraw = withdraw
        self._queue: asyncio.Queue[Delta | EngineError | None] = asyncio.Queue()
        self._last_s: dict[int, float] = {}

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache supplied, known from the first Delta on."""
        return self.answer.cached_tokens

    def __aiter__(self) -> "OutputStream":
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
