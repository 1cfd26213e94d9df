"""Answer: one request's sequences on their way from TokenEvents to text. Shared by the server and offline use."""

from engine.text import Delta, TextCodec, TextStream
from scheduler.plan import TokenEvent
from scheduler.request import Request


class Answer:
    """Turns a request's TokenEvents into Deltas and knows which of its sequences still run."""

    def __init__(self, request: Request, codec: TextCodec) -> None:
        self.request = request
        self.cached_tokens = 0
        self.output_tokens = 0
        self._texts = {index: TextStream(codec, request.params) for index in range(request.params.n)}

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
