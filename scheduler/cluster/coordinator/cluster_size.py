"""Say how many nodes a cluster should have: the demand of late, what nodes take, and patience, put together.

Whoever starts and ends nodes asks, with the bounds and with how many it runs, and does what it is told. Nothing is
decided while nobody asks. What is known is soft: a new coordinator begins with the number that runs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.demand import DemandOptions, DemandTracker
from scheduler.cluster.coordinator.node_need import NeededNodes, NodeNeed
from scheduler.cluster.coordinator.recent_refusals import RecentRefusals
from scheduler.cluster.coordinator.size_keeper import (
    SHRINK_MARGIN,
    SizeBounds,
    SizeChange,
    SizeKeeper,
    SizeLook,
)
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.state import Demand

_LOOKS = 5  # in the time for which more must be needed: a look may take as long as a plan
_CALM_LOOKS = 20  # in the time for which one fewer must do: each makes a plan
_ALL = AdapterRef("all tokens", "", 1, (), 0)
_OF_BASE = AdapterRef("tokens of the base model", "", 2, (), 0)


@dataclass(frozen=True, slots=True)
class WantedSize:
    """How many nodes are wanted within which bounds, how many serve, and the last change."""

    wanted: int
    present: int
    last: SizeChange
    bounds: SizeBounds


class ClusterSize:
    """Counts what is asked for, and answers how many nodes that takes.

    A placement plans for adapters that it has not seen yet, which is no reason for a node. So the demand of all
    adapters together is taken to be no more than was asked for of late.
    """

    def __init__(self, problem: Callable[[float], Problem], need: NodeNeed) -> None:
        """Take the nodes that stay, the demand and the placement from `problem`."""
        self._problem, self._need = problem, need
        self._tracker = DemandTracker(DemandOptions())
        self._tracker.add(_ALL)
        self._tracker.add(_OF_BASE)
        self._refusals = RecentRefusals()
        self._keeper: SizeKeeper | None = None
        self._bounds: SizeBounds | None = None
        self._looked_s = self._tried_s = float("-inf")
        self._spares_one = False  # as last tried
        self.told: WantedSize | None = None
        """What was answered last; None if nobody has asked."""

    def count(self, tokens: Iterable[tuple[AdapterRef, int]], refused: bool, now: float) -> None:
        """Count tokens that nodes took in, or that routers refused, of adapters and of the base model."""
        for ref, count in tokens:
            self._tracker.observe(_ALL, count, now)
            if ref.is_base:
                self._tracker.observe(_OF_BASE, count, now)
            self._refusals.count(count, refused, now)

    def ask(self, bounds: SizeBounds, running: int, now: float) -> WantedSize:
        """Return how many nodes are wanted; the caller runs `running`, of which some may not serve yet."""
        problem = self._problem(now)
        present = len(problem.nodes)
        if self._keeper is None:
            self._keeper = SizeKeeper(bounds.clamped(max(running, present)), now)
        keeper = self._keeper
        if bounds != self._bounds or now - self._looked_s >= bounds.grow_after_s / _LOOKS:
            self._bounds, self._looked_s = bounds, now
            before = keeper.wanted
            if keeper.decide(self._look(problem, bounds, keeper, running, now), bounds, now) != before:
                self._refusals.clear()
                self._tried_s = float("-inf")
        self.told = WantedSize(keeper.wanted, present, keeper.last, bounds)
        return self.told

    def _look(
        self, problem: Problem, bounds: SizeBounds, keeper: SizeKeeper, running: int, now: float
    ) -> SizeLook:
        rates = self._tracker.project(now).tokens_per_s
        whole, wanted, present = rates[_ALL], keeper.wanted, len(problem.nodes)
        base = min(whole, rates[_OF_BASE])
        if present < wanted:
            self._refusals.clear()  # what comes soon may be enough
        refusing_at = self._refusals.persist(bounds.grow_after_s, now)
        if not present:
            return SizeLook(0, running, NeededNodes(wanted), False, refusing_at, whole)
        problem = replace(problem, demand=_bounded(problem.demand, whole - base))
        need = self._need.least(problem, base, wanted, max(wanted, bounds.highest))
        if now - self._tried_s >= bounds.shrink_after_s / _CALM_LOOKS or need.nodes > wanted:
            self._tried_s = now
            may = wanted > bounds.lowest and running <= wanted and need.nodes <= wanted
            self._spares_one = may and self._need.lacks(problem, base, wanted - 1, SHRINK_MARGIN) is None
        return SizeLook(present, running, need, self._spares_one, refusing_at, whole)


def _bounded(demand: Demand, tokens_per_s: float) -> Demand:
    """Return the demand in proportion, of at most so many tokens/s in all."""
    rates = demand.tokens_per_s
    factor = min(1.0, tokens_per_s / max(sum(rates.values()), 1e-9))
    return Demand(MappingProxyType({ref: rate * factor for ref, rate in rates.items()}))
