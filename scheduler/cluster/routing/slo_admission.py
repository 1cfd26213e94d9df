"""Admit a request to a node only if it would be in time there; say when to come again if it would not.

A queue in front of nodes that are full makes every request late, and goes on doing so after the load has gone.
So a request waits at the door, where it holds nothing, while no node would answer it in time. It is refused when
no node could any more, or at once if more waits before it than can be sent by then.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.routing.base import NodeLoad, RouteRequest
from scheduler.cluster.routing.cost_estimator import CostEstimator


@dataclass(frozen=True, slots=True)
class SloAdmissionOptions:
    """How strictly to admit.

    A first token is to be predicted within `first_token_part` of the SLO's time, a step within `step_part` of that
    between tokens. What is sent is averaged over `rate_s`.
    """

    first_token_part: float = 0.9
    step_part: float = 1.0
    rate_s: float = 4.0


class SloAdmission:
    """Says whether a request would be in time on a node, and whether waiting for one is of any use."""

    def __init__(self, costs: CostEstimator, slo: Slo, options: SloAdmissionOptions | None = None) -> None:
        self.slo = slo
        self._costs, self._options = costs, options or SloAdmissionOptions()
        self._sent = _RecentWork(self._options.rate_s)

    def work_s(self, ask: RouteRequest) -> float:
        """Return what the request costs a node."""
        return self._costs.work_s(ask)

    def expires_s(self, ask: RouteRequest, arrived_s: float) -> float:
        """Return when even a node that does nothing else could not answer in time any more."""
        idle_s = self._costs.idle_first_token_s(ask)
        return arrived_s + max(0.0, self._options.first_token_part * self.slo.ttft_s - idle_s)

    def left_s(self, arrived_s: float, now: float) -> float:
        """Return in which time a request's first token is wanted, with some to spare."""
        return arrived_s + self._options.first_token_part * self.slo.ttft_s - now

    def is_in_time(
        self, ask: RouteRequest, node: str, load: NodeLoad, fetch_s: float = 0.0, may_wait: bool = False
    ) -> bool:
        """Say whether the node would give the first token when it is wanted, and the others in the SLO's time.

        Where it has no room now the request is better off at the door: whichever node has room first takes it.
        Where there is one node alone it `may_wait` there.
        """
        first_token_s, step_s, _, full = self._costs.estimate(ask, node, load, fetch_s)
        in_time = first_token_s <= ask.first_token_in_s and step_s <= self._options.step_part * self.slo.tbt_s
        return in_time and (may_wait or full <= 1)

    def sent(self, work_s: float, now: float) -> None:
        """Note that a request of that work was sent."""
        self._sent.add(work_s, now)

    def wait_s(self, work_before_s: float, now: float) -> float:
        """Predict how long what waits takes to be sent, at the pace at which the last seconds' work was."""
        sent_s, since_s = self._sent.total_s(now), self._sent.since_s(now)
        if work_before_s <= 0 or since_s < self._options.rate_s / 2:
            return 0.0  # nothing waits, or too little was sent to tell the pace
        return work_before_s * since_s / sent_s


class _RecentWork:
    """Sums up the work of the last `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._noted: deque[tuple[float, float]] = deque()
        self._sum_s = 0.0

    def add(self, work_s: float, now: float) -> None:
        """Note some work."""
        self._noted.append((now, work_s))
        self._sum_s += work_s

    def total_s(self, now: float) -> float:
        """Return the work noted in the window that ends now."""
        while self._noted and self._noted[0][0] < now - self._window_s:
            self._sum_s -= self._noted.popleft()[1]
        return self._sum_s if self._noted else 0.0

    def since_s(self, now: float) -> float:
        """Return the seconds since the first of it, 0 for none."""
        return now - self._noted[0][0] if self._noted else 0.0


class RetryTimes:
    """Says when a refused client should come again.

    An overload that has lasted for some time is taken to last as long again. So whoever comes back then was told
    at most twice too late, and clients come ever more rarely the longer it lasts. Their times are spread over half
    as much more, lest all come back at once.
    """

    def __init__(self, rng: np.random.Generator, least_s: float = 1.0, most_s: float = 60.0) -> None:
        self._rng, self._least_s, self._most_s = rng, least_s, most_s
        self._began_s = self._last_s = float("-inf")

    def after_s(self, now: float) -> float:
        """Return the seconds to tell a client that is refused now."""
        if now - self._last_s > 2 * self._least_s:
            self._began_s = now
        self._last_s = now
        lasting_s = min(self._most_s, max(self._least_s, now - self._began_s))
        return lasting_s * (1 + 0.5 * float(self._rng.random()))
