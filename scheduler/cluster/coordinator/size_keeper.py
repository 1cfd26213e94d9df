"""Decide how many nodes there should be from how many are needed now: grow soon, shrink late and one at a time.

A node takes minutes to start and moves adapters when it goes. So a number that follows each change of the load would
cost more than it saves. It knows no node: numbers and the time go in, a number comes out.
"""

import math
from dataclasses import dataclass
from typing import Literal

from scheduler.cluster.coordinator.node_need import NeededNodes, NeedReason

SHRINK_MARGIN = 0.7
"""How busy, in parts of what nodes may be, those left over may be for one to go: else chance would call it back."""

REMEMBERED_S = 3600.0
"""For which a number of nodes that has refused requests is not trusted with as much again."""

SizeReason = NeedReason | Literal["start", "bounds", "refused", "calm"]


@dataclass(frozen=True, slots=True)
class SizeBounds:
    """Between how many nodes to choose, and how patiently.

    More are wanted once they were needed for `grow_after_s` on end. One fewer is once that would have done, with
    a margin, for `shrink_after_s` on end.
    """

    lowest: int
    highest: int
    grow_after_s: float = 10.0
    shrink_after_s: float = 300.0

    def clamped(self, nodes: int) -> int:
        """Return the nearest number within the bounds."""
        return min(max(nodes, self.lowest), self.highest)


@dataclass(frozen=True, slots=True)
class SizeLook:
    """What is so at one time.

    Of `running` nodes `present` ones serve, while `need` are needed. `spares_one` says that one fewer than wanted
    would do with the margin. Clients are projected to ask for `tokens_per_s` in all. Where requests are refused
    again and again, `refusing_at` is how many tokens/s were asked for while they were; else it is None.
    """

    present: int
    running: int
    need: NeededNodes
    spares_one: bool
    refusing_at: float | None
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class SizeChange:
    """One time that another number of nodes was wanted, and why."""

    at_s: float
    before: int
    wanted: int
    reason: SizeReason


class SizeKeeper:
    """Owner of the number of nodes that are wanted. It begins with as many as there are."""

    def __init__(self, nodes: int, now: float) -> None:
        self.last = SizeChange(now, nodes, nodes, "start")
        self._over_s: float | None = None  # since when more are needed, and the least that were since
        self._over_by: NeededNodes | None = None
        self._calm_s: float | None = None  # since when one fewer would do
        self._too_few: dict[int, tuple[float, float]] = {}  # nodes → when they refused, at how many tokens/s
        self._calm_at = math.inf  # tokens/s when one fewer was last thought to do, if nothing changed since

    @property
    def wanted(self) -> int:
        """Return how many nodes are wanted."""
        return self.last.wanted

    def decide(self, look: SizeLook, bounds: SizeBounds, now: float) -> int:
        """Return how many nodes are wanted from now on."""
        if bounds.clamped(self.wanted) != self.wanted:
            self._change(bounds.clamped(self.wanted), "bounds", now)
        elif self._needs_more(look, bounds, now):
            assert self._over_by is not None
            self._change(min(self._over_by.nodes, bounds.highest), self._over_by.reason, now)
        elif self._refuses(look, bounds, now):
            self._change(self.wanted + 1, "refused", now)
        elif self._spares_one(look, bounds, now):
            self._change(self.wanted - 1, "calm", now)
            self._calm_at = look.tokens_per_s
        return self.wanted

    def trusts(self, nodes: int, tokens_per_s: float, now: float) -> bool:
        """Tell whether so many nodes have not lately refused requests when little more was asked of as many or more."""
        return not any(
            count >= nodes and now - at_s < REMEMBERED_S and tokens_per_s > SHRINK_MARGIN * rate
            for count, (at_s, rate) in self._too_few.items()
        )

    def _needs_more(self, look: SizeLook, bounds: SizeBounds, now: float) -> bool:
        """Tell whether more have been needed for long enough; the least of what was needed counts."""
        if min(look.need.nodes, bounds.highest) <= self.wanted:
            self._over_s = self._over_by = None
            return False
        if self._over_s is None or self._over_by is None:
            self._over_s, self._over_by = now, look.need
        if look.need.nodes < self._over_by.nodes:
            self._over_by = look.need
        return now - self._over_s >= bounds.grow_after_s

    def _refuses(self, look: SizeLook, bounds: SizeBounds, now: float) -> bool:
        """Tell whether all that are wanted serve and refuse, and remember at what rate.

        Those who are refused ask again, so the rate may be too high by far. If it let the last node go, the rate at
        which it did was too high as well.
        """
        if look.refusing_at is None or look.present < self.wanted or self.wanted >= bounds.highest:
            return False
        self._too_few[self.wanted] = (now, min(look.refusing_at, self._calm_at))
        return True

    def _spares_one(self, look: SizeLook, bounds: SizeBounds, now: float) -> bool:
        """Tell whether one fewer would have done for long enough, while all that run served.

        It may be one that could not be started yet.
        """
        calm = (
            look.spares_one
            and look.refusing_at is None
            and self.wanted > bounds.lowest
            and look.present >= min(self.wanted, look.running)
            and self.trusts(self.wanted - 1, look.tokens_per_s, now)
        )
        if not calm:
            self._calm_s = None
            return False
        self._calm_s = now if self._calm_s is None else self._calm_s
        return now - self._calm_s >= bounds.shrink_after_s

    def _change(self, wanted: int, reason: SizeReason, now: float) -> None:
        self.last = SizeChange(now, self.wanted, wanted, reason)
        self._over_s = self._over_by = self._calm_s = None
        self._calm_at = math.inf
