"""Decide which resident adapters make room for others.

Adapters take runs of neighbouring pages, so those that make room must be neighbours too. Whoever goes costs the
reload that is likely to follow. The live store and the simulated one ask here; this module knows pages, steps and
seconds, and no tensor, thread or clock.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, Usage

_HALF_LIFE_STEPS = 1000
_PATIENCE_STEPS = 64  # how long what is wanted but does not run keeps its place against what waits
_NEVER_RAN = 1e-3  # the popularity of what no step has run, so that its reload still counts

Cost = tuple[int, float]
"""(how many adapters of live requests go, the losses of all that go): compared in this order, and summed."""


def popularity(usage: Usage, step: int) -> float:
    """Count the recent steps that ran an adapter, each weighing half as much a half-life later."""
    return usage.uses * 0.5 ** ((step - usage.used_step) / _HALF_LIFE_STEPS)


class EvictionLoss(Protocol):
    """Says what it costs that adapters go. Losses of neighbours are summed."""

    def losses(self, occupants: Sequence[Occupant], step: int) -> Sequence[float]:
        """Return the loss of each occupant, 0 or more."""
        ...


class ReloadLoss:
    """The seconds of a reload, weighted by how often recent steps ran the adapter."""

    def losses(self, occupants: Sequence[Occupant], step: int) -> Sequence[float]:
        """Return reload_s · (popularity + a little)."""
        return [each.reload_s * (popularity(each.usage, step) + _NEVER_RAN) for each in occupants]


@dataclass(frozen=True, slots=True)
class CheapestWindow:
    """ResidencyPolicy: of all windows wide enough, empty the one whose occupants cost least."""

    loss: EvictionLoss = field(default_factory=ReloadLoss)

    def displaced(self, request: PageRequest, occupants: Sequence[Occupant]) -> tuple[Occupant, ...] | None:
        """Choose the neighbours that go. See ResidencyPolicy."""
        placed = sorted(occupants, key=lambda each: each.run)
        losses = self.loss.losses(placed, request.step)
        costs = [_cost(each, loss, request) for each, loss in zip(placed, losses, strict=True)]
        inside = _cheapest([each.run for each in placed], costs, request)
        if inside is None:
            return None
        return tuple(each for each in placed[inside] if each.claim is not Claim.LEAVING)

    def ran(self, usage: Usage, step: int) -> Usage:
        """Count one step more. See ResidencyPolicy."""
        return Usage(popularity(usage, step) + 1.0, step, usage.placed_step)

    def placed(self, usage: Usage, step: int) -> Usage:
        """Begin the adapter's stay: its patience starts now. See ResidencyPolicy."""
        return Usage(popularity(usage, step), step, step)


def _cost(occupant: Occupant, loss: float, request: PageRequest) -> Cost | None:
    """Return what it costs to empty an occupant's pages; None where that is impossible."""
    match occupant.claim:
        case Claim.LEAVING:
            return 0, 0.0
        case Claim.UNUSED:
            return 0, loss
        case _ if request.force is Force.CLEAR:
            return 1, loss
        case Claim.RETAINED if _had_its_chance(occupant.usage, request):
            return 1, loss
        case _:
            return None


def _had_its_chance(usage: Usage, request: PageRequest) -> bool:
    """Return whether an adapter that live requests use could have run and did not."""
    if request.force is Force.IDLE:
        return usage.placed_step + 1 < request.step  # a plan has known it, and did not run it
    return request.force is Force.NOT_RUNNING and request.step - usage.used_step >= _PATIENCE_STEPS


def _cheapest(runs: Sequence[PageRun], costs: Sequence[Cost | None], request: PageRequest) -> slice | None:
    """Find who is inside the window that costs least to empty; None if every window holds something fixed.

    `runs` are disjoint and ascending, and `costs` belong to them. Any window can slide left, losing nothing, until
    it meets the end of an occupant or of the arena, so only those starts are tried. Against evicting what is
    cheapest for each byte, one by one, no victim leaves a hole that is too small to use.
    """
    best: tuple[Cost, slice] | None = None
    starts = [run.start for run in runs]
    for first, start in enumerate((0, *(run.stop for run in runs))):
        stop = start + request.pages
        if stop > request.num_pages:
            break
        inside = slice(first, bisect_left(starts, stop, lo=first))
        found = costs[inside]
        known = [cost for cost in found if cost is not None]
        if len(known) < len(found):
            continue
        total = sum(cost[0] for cost in known), sum(cost[1] for cost in known)
        if best is None or total < best[0]:
            best = total, inside
    return best[1] if best else None
