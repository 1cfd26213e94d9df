"""When to place anew, and whether the new placement is worth its moves. Knows load, by a measure that it is
given, and bytes; no node's condition."""

from dataclasses import dataclass
from typing import Literal

from scheduler.cluster.coordinator.node_need import NodeNeed
from scheduler.cluster.placement.base import Measure, PlacementPolicy, Problem, fetched_bytes
from scheduler.cluster.state import Placement

Reason = Literal[
    "start", "node_joined", "node_left", "node_pace", "demand", "pin", "failed_load", "adapter_added"
]
"""What happened that a plan is made for: a coordinator began, nodes changed, an adapter's demand or pin did, a node
could not get one, or one is new. A plan at its usual time, when nothing did, is made for demand as well."""


@dataclass(frozen=True, slots=True)
class ReplanOptions:
    """When a plan is made, and what it must gain.

    It is made every `interval_s`, and as soon as `urgent_s` after the last when something happened. Below
    `comfort`, the load of the busiest node that needs no relief, nothing moves. Above, the busiest node must
    gain, relatively, at least `min_gain` plus `churn_price` for each time that all bytes would move.
    `headroom` is the part of each node's memory that plans and moves leave free. It is for requests of what
    is not planned there, and for what is dropped but still in use.
    """

    interval_s: float = 10.0
    urgent_s: float = 1.0
    comfort: float = 0.5
    min_gain: float = 0.05
    churn_price: float = 0.25
    headroom: float = 0.1


class Replanner:
    """Asks a placement policy, and says yes or no to what it proposes."""

    def __init__(self, policy: PlacementPolicy, measure: Measure, options: ReplanOptions) -> None:
        self._policy, self._measure, self.options = policy, measure, options
        self.need = NodeNeed(policy, measure)
        self._last_s = float("-inf")
        self._urgent = self._must = False
        self._noted: dict[Reason, None] = {}  # since the last plan
        self.reasons: tuple[Reason, ...] = ()  # of the last plan

    def note(self, reason: Reason) -> None:
        """Remember what the next plan will have seen."""
        self._noted[reason] = None

    def hurry(self, reason: Reason, must: bool = False) -> None:
        """Ask for a plan soon, since something happened that it should see.

        `must`: its placement is to be taken whatever it costs, since nodes came or went.
        """
        self.note(reason)
        self._urgent = True
        self._must = self._must or must

    def due(self, now: float) -> bool:
        """Return whether it is time for a plan."""
        wait_s = self.options.urgent_s if self._urgent else self.options.interval_s
        return now - self._last_s >= wait_s

    def plan(self, problem: Problem, now: float) -> Placement | None:
        """Return the placement to go to, or None to stay with the one before."""
        must, self._must, self._urgent, self._last_s = self._must, False, False, now
        self.reasons, self._noted = tuple(self._noted) or ("demand",), {}
        if not must and self._busiest(problem, problem.previous) <= self.options.comfort:
            return None
        proposed = self._policy.place(problem)
        return proposed if must or self._is_worth_it(problem, proposed) else None

    def load(self, problem: Problem, placement: Placement) -> dict[str, float]:
        """Load by node, 1 being all it should take."""
        return dict(self._measure(problem, placement))

    def _busiest(self, problem: Problem, placement: Placement) -> float:
        return max(self.load(problem, placement).values())

    def _is_worth_it(self, problem: Problem, proposed: Placement) -> bool:
        before, after = self._busiest(problem, problem.previous), self._busiest(problem, proposed)
        everything = sum(ref.nbytes for ref in problem.demand.tokens_per_s)
        churn = fetched_bytes(problem, proposed) / max(everything, 1)
        return before - after >= before * (self.options.min_gain + self.options.churn_price * churn)
