"""Refuse at once what a single server would answer too late, and count what runs there to predict that.

It decides by the routers' admission, told one load: this engine's own. Requests wait in the engine and not here.
"""

import math
import time
from collections.abc import Iterable, Sequence

from engine.errors import EngineError, NotAdmitted, NotInTime
from engine.live.live_outputs import LiveOutputs
from engine.live.node_load import NodeJobs
from scheduler.cluster.routing.base import RouteRequest
from scheduler.cluster.routing.slo_admission import RetryTimes, SloAdmission
from scheduler.plan import SequenceKey, TokenEvent
from scheduler.request import Request

_HERE = "this server"


class InTimeAdmission:
    """Says which requests an engine answers within the SLO. Used on one event loop; a StepListener."""

    def __init__(self, admission: SloAdmission, jobs: NodeJobs, retry: RetryTimes) -> None:
        """Know no request. `jobs` counts them, with what steps turn out to cost."""
        self._admission, self._jobs, self._retry = admission, jobs, retry
        self._outputs: LiveOutputs | None = None

    def tell(self, outputs: LiveOutputs) -> None:
        """Pass on to `outputs` what the engine says of requests."""
        self._outputs = outputs

    def first_token_by_s(self, now_s: float) -> float | None:
        """Return when the first token of a request that comes now is wanted; None for whenever it comes."""
        ttft_s = self._admission.slo.ttft_s
        return None if math.isinf(ttft_s) else now_s + ttft_s

    def check(self, requests: Iterable[Request], now_s: float) -> None:
        """Raise NotAdmitted if one of `requests`, which come together, would be late."""
        load = self._jobs.load(draining=False)
        left_s = self._admission.left_s(now_s, now_s)
        for request in requests:
            ask = RouteRequest(request.adapter, len(request.prompt_token_ids), first_token_in_s=left_s)
            load = load if request.params.n == 1 else load.plus(ask, request.params.n - 1)
            if not self._admission.is_in_time(ask, _HERE, load, may_wait=True):
                raise self._refusal(now_s)
            load = load.plus(ask, 1)

    def begin(self, request: Request) -> None:
        """Count a request that the engine has taken."""
        self._jobs.begin(request)

    def hear(self, events: Sequence[TokenEvent]) -> None:
        """Count tokens, and pass them on."""
        for event in events:
            request_id, index = event.key.request_id, event.key.index
            if event.token_id is not None:
                self._jobs.drew(request_id, index)
            if event.finish_reason is not None:
                self.ended(event.key)
        if self._outputs is not None:
            self._outputs.hear(events)

    def fail(self, request_id: str, error: EngineError) -> None:
        """Forget a request that the engine gave up; one that was too late is told when to come again."""
        self._jobs.end(request_id)
        if self._outputs is not None:
            late = isinstance(error, NotInTime)
            self._outputs.fail(request_id, self._refusal(time.monotonic()) if late else error)

    def ended(self, key: SequenceKey) -> None:
        """Note that one sequence has ended."""
        if self._jobs.ended(key.request_id, key.index):
            self._jobs.end(key.request_id)

    def end(self, request_id: str) -> None:
        """Forget a request that was aborted; unknown ids are fine."""
        self._jobs.end(request_id)

    def _refusal(self, now_s: float) -> NotAdmitted:
        return NotAdmitted(math.ceil(self._retry.after_s(now_s)))
