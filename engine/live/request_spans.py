"""Tell where a traced request's time went in this engine: waiting for a step, reading its prompt, drawing tokens.

The step thread says when a request first runs, the event loop everything else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.metrics.tracing import Attributes, Tracing
from scheduler.plan import StepPlan, TokenEvent
from scheduler.request import Request


@dataclass(slots=True)
class _Moments:
    """When a request came, was first in a step and drew its first token; times are since 1970."""

    request: Request
    open: set[int]
    came_ns: int = field(default_factory=time.time_ns)
    ran_ns: int | None = None
    first_token_ns: int | None = None
    tokens: int = 0
    cached_tokens: int = 0


class RequestSpans:
    """The traced requests that have not ended. Their spans are made once they have: all that a step costs is a look."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        """Make none without `tracing`."""
        self._tracing = tracing
        self._live: dict[str, _Moments] = {}
        self._waiting: dict[str, _Moments] = {}  # those that no step has had yet

    def begin(self, request: Request) -> None:
        """Note that the engine took a request."""
        if self._tracing is not None and request.trace:
            moments = _Moments(request, set(range(request.params.n)))
            self._live[request.request_id] = self._waiting[request.request_id] = moments

    def ran(self, plan: StepPlan, seconds: float) -> None:
        """Note which requests ran for the first time in a step that took so long. The step thread calls this."""
        if not self._waiting:
            return
        begun_ns = time.time_ns() - round(seconds * 1e9)
        for part in plan.slices:
            if (moments := self._waiting.pop(part.key.request_id, None)) is not None:
                moments.ran_ns = max(begun_ns, moments.came_ns)

    def heard(self, events: Sequence[TokenEvent]) -> None:
        """Note tokens and ends of sequences."""
        for event in events if self._live else ():
            moments = self._live.get(event.key.request_id)
            if moments is None:
                continue
            if event.token_id is not None:
                moments.tokens += 1
                moments.cached_tokens = event.cached_tokens
                moments.first_token_ns = moments.first_token_ns or time.time_ns()
            if event.finish_reason is not None:
                self.finished(event.key.request_id, event.key.index)

    def finished(self, request_id: str, index: int) -> None:
        """Note that one sequence has ended; with the last one its request has."""
        if (moments := self._live.get(request_id)) is not None:
            moments.open.discard(index)
            if not moments.open:
                self.ended(request_id, "done")

    def ended(self, request_id: str, outcome: str) -> None:
        """Make the spans of a request that has ended: done, aborted or failed."""
        self._waiting.pop(request_id, None)
        moments = self._live.pop(request_id, None)
        if moments is None or self._tracing is None:
            return
        ended_ns, trace = time.time_ns(), moments.request.trace
        told = _attributes(moments, outcome)
        ran_ns, first_ns = moments.ran_ns, moments.first_token_ns
        self._tracing.add("queue", trace, moments.came_ns, ran_ns or ended_ns, told)
        if ran_ns is not None:
            self._tracing.add("prefill", trace, ran_ns, first_ns or ended_ns, told)
        if first_ns is not None:
            self._tracing.add("decode", trace, first_ns, ended_ns, told)


def _attributes(moments: _Moments, outcome: str) -> Attributes:
    request = moments.request
    return {
        "loraserve.adapter": request.adapter.name,
        "loraserve.rank": request.adapter.rank,
        "loraserve.outcome": outcome,
        "loraserve.cached_tokens": moments.cached_tokens,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.output_tokens": moments.tokens,
    }
