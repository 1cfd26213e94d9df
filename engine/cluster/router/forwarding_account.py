"""Account for what a router forwards: counts for metrics, and spans of single requests for whoever traces them."""

import time
from collections import Counter
from dataclasses import dataclass, field

from engine.metrics.tracing import LiveSpan, Tracing
from scheduler.request import Request


@dataclass(slots=True)
class ForwardingCounts:
    """What happened since the start."""

    sent_to: Counter[str] = field(default_factory=Counter[str])  # by node
    moved: int = 0
    streams_moved: int = 0
    refused: dict[str, int] = field(default_factory=dict[str, int])


class ForwardingSpans:
    """A span for each time that a request is sent to a node, until it ends there or goes on elsewhere."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        """Make none without `tracing`, and none of a request that nobody traces."""
        self._tracing = tracing
        self._live: dict[str, LiveSpan] = {}
        self._left_ns: dict[str, int] = {}  # when a request that is to go on was last given back

    def sent(self, request: Request, node: str) -> str:
        """Begin a span of a request that is sent; return what the node's spans have as their parent."""
        if self._tracing is None or not request.trace:
            return ""
        now_ns = time.time_ns()
        arrival_ns = now_ns - round((time.monotonic() - request.arrival_s) * 1e9)
        waited_from_ns = self._left_ns.pop(request.request_id, arrival_ns)
        self._tracing.add("route", request.trace, waited_from_ns, now_ns, {"loraserve.node": node})
        span = self._live[request.request_id] = self._tracing.begin("forward", request.trace)
        return span.trace

    def left(self, request_id: str, outcome: str) -> None:
        """End the span of a request that a node gave back or was lost with: it goes on elsewhere."""
        if (span := self._live.pop(request_id, None)) is not None:
            span.end({"loraserve.outcome": outcome}, outcome)
            self._left_ns[request_id] = time.time_ns()

    def ended(self, request_id: str, outcome: str) -> None:
        """End the span of a request that has ended for good, if it is at a node."""
        self._left_ns.pop(request_id, None)
        if (span := self._live.pop(request_id, None)) is not None:
            span.end({"loraserve.outcome": outcome})
