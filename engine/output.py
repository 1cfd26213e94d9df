"""Turn a request's token events into text, and keep what came until its reader takes it. Knows no engine.

The server and offline use share RequestOutput: one awaits what comes, the other takes what has come.
"""

import asyncio
import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from engine.errors import EngineError
from engine.tokenizer import Tokenizer
from scheduler.plan import FinishReason, TokenEvent, TokenLogprob
from scheduler.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sequence of a request gained: text that is safe to show, and the tokens behind it.

    `index` is the sequence's number among the request's `n`. Text lags behind tokens while a character is
    unfinished or a stop string may be starting; with `finish_reason` nothing is held back any more.
    `logprobs` is empty or aligned with `token_ids`. `stop_reason` is the stop string, or the id out of
    `stop_token_ids`, that ended the sequence. `prompt_logprobs` comes whole with a sequence's first Delta.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    """Join one sequence's Deltas, all of them, into one."""
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


class RequestOutput:
    """One request's output: the Deltas of all its sequences, interleaved, as they come.

    On an event loop iterate to the end, or `aclose` to abort what still runs. Iterating raises EngineError
    if the engine gave the request up. Elsewhere `take` what has come.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, abort: Callable[[str], None]) -> None:
        """Begin without any Delta; `abort` is called with the request's id when its reader leaves."""
        self.request = request
        self.cached_tokens = 0  # prompt tokens that the prefix cache supplied, known from the first Delta on
        self.token_times_s: tuple[list[float], ...] = tuple([] for _ in range(request.params.n))
        """For each sequence, seconds from the request's submission to each of its tokens."""
        self._abort = abort
        self._running = {index: Detokenizer(tokenizer, request.params) for index in range(request.params.n)}
        self._arrived: deque[Delta] = deque()
        self._error: EngineError | None = None
        self._changed = asyncio.Event()

    @property
    def adapter_digest(self) -> str:
        """The digest of the adapter's content that answers; empty for the base model."""
        return self.request.adapter.digest

    @property
    def is_open(self) -> bool:
        """True while a sequence still runs."""
        return bool(self._running)

    @property
    def running(self) -> tuple[int, ...]:
        """The sequences that still run."""
        return tuple(self._running)

    @property
    def output_tokens(self) -> int:
        """Tokens of all sequences so far."""
        return sum(map(len, self.token_times_s))

    def push(self, event: TokenEvent, now_s: float) -> Delta | None:
        """Add and return the Delta of an event; None if the sequence's text had ended before it.

        If the Delta ends the sequence and the event does not, a stop string was met, which the core cannot know.
        """
        index = event.key.index
        detokenizer = self._running.get(index)
        if detokenizer is None:
            return None
        delta = detokenizer.push(event)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        if delta.token_ids:
            self.token_times_s[index].append(now_s - self.request.arrival_s)
        if delta.finish_reason is not None:
            del self._running[index]
        self._arrived.append(delta)
        self._changed.set()
        return delta

    def fail(self, error: EngineError) -> None:
        """End the output with an error, after what has come."""
        self._error = error
        self._close()

    def take(self) -> tuple[Delta, ...]:
        """Take all Deltas that have come since the last time, without waiting."""
        arrived = tuple(self._arrived)
        self._arrived.clear()
        return arrived

    def __aiter__(self) -> "RequestOutput":
        return self

    async def __anext__(self) -> Delta:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._running:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._arrived.popleft()

    async def aclose(self) -> None:
        """Abort the sequences that still run; their blocks and adapter are free once this returns."""
        if self._running:
            self._close()
            self._abort(self.request.request_id)

    def _close(self) -> None:
        self._running.clear()
        self._changed.set()


class Detokenizer:
    """Turns one sequence's tokens into text, and finds stop strings.

    The pieces of text, joined, are what the sequence adds to its prompt: never a part of a character, nor
    what may become a stop string, nor a stop string that is not to be shown. A stop string counts once it is
    complete, wherever the tokens end; of several the one that is complete first. Until `min_tokens` tokens
    are drawn none counts. One that is a special token's text is met by that token, though it stands for no text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        """Begin with the sequence's first token."""
        self._tokenizer = tokenizer
        self._stops = params.stop
        self._stop_token_ids = params.stop_token_ids
        self._stop_tokens = tokenizer.special_among(params.stop) if params.stop else {}
        self._min_tokens = params.min_tokens
        self._skip_special = params.skip_special_tokens
        self._include_stop = params.include_stop_str_in_output
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # the end of the text that may be a stop string's beginning
        self._num_tokens = 0
        self.finished = False

    def push(self, event: TokenEvent) -> Delta:
        """Turn one event into a Delta. After one with a finish_reason (`finished`) there is nothing to push."""
        assert not self.finished, "the sequence has ended; drop its further events"
        token_id, reason = event.token_id, event.finish_reason
        self._num_tokens += token_id is not None
        counts = self._num_tokens >= self._min_tokens
        special = self._stop_tokens.get(token_id) if token_id is not None and counts else None
        if special is not None:
            reason = FinishReason.STOP
        # The token that stops a sequence is no text, unless that is asked for.
        hidden = reason is FinishReason.STOP and not self._include_stop
        content = b"" if token_id is None or hidden else self._bytes_of(token_id, shown=special is not None)
        text, stop = self._release(
            self._utf8.decode(content, final=reason is not None), flush=reason is not None
        )
        stop = stop or special
        stop_reason: str | int | None = stop
        if stop is not None:
            reason = FinishReason.STOP
        elif reason is FinishReason.STOP and token_id in self._stop_token_ids:
            stop_reason = token_id
        self.finished = reason is not None
        return Delta(
            index=event.key.index,
            text=text,
            token_ids=() if token_id is None else (token_id,),
            logprobs=() if event.logprob is None else (event.logprob,),
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt_logprobs=event.prompt_logprobs,
        )

    def _bytes_of(self, token_id: int, shown: bool) -> bytes:
        if self._skip_special and not shown and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _release(self, text: str, flush: bool) -> tuple[str, str | None]:
        """Return what may be shown now that `text` is known, and the stop string that it completes, if any."""
        if not self._stops:
            return text, None
        text = self._held + text
        if self._num_tokens >= self._min_tokens and (found := _first_complete(text, self._stops)):
            end, stop = found
            self._held = ""
            return text[: end if self._include_stop else end - len(stop)], stop
        keep = 0 if flush else _open_stop(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _first_complete(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Find where in `text` a stop string is complete first, and which; the longest of those that end there."""
    found = [(start + len(stop), -len(stop), stop) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    end, _, stop = min(found)
    return end, stop


def _open_stop(text: str, stops: Sequence[str]) -> int:
    """Measure the longest end of `text` with which a stop string begins."""
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
