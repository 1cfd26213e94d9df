"""Terraced placement: nodes stand on terraces of equal rank ceiling, and as little as possible moves. Best where
load is what operating points say, every request of another adapter; ours (`stratified`) forecasts instead.

    ceilings   the least utilisation of the busiest node that any placement could reach (`ceilings`)
    stand      which node takes which ceiling: exact assignment, weighted by the bytes that may stay (`terrain`)
    release    what must leave overloaded nodes at the fewest bytes: minimum-cost flow (`release`)
    fill       what has no place, largest rank and demand first: onto nodes that hold it, else the emptiest that
               may; split only where it does not fit whole (`packing`)

An adapter whose demand is a large part of a node's time gets two copies, in two zones where there are two.
Memory is a hard limit: what fits nowhere is left out.
"""

from dataclasses import dataclass
from types import MappingProxyType

from scheduler.cluster.cost import Kernel
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.packing import Packing
from scheduler.cluster.placement.terrain import survey, terrain
from scheduler.cluster.state import Placement


@dataclass(frozen=True, slots=True)
class TerracedOptions:
    """`slack`: how far, relatively, utilisation may exceed the least possible before anything moves; `hot`:
    the part of a node's planned time from which an adapter gets a second copy; `minor`: shares too small to
    keep."""

    slack: float = 0.0
    hot: float = 0.5
    minor: float = 0.2


class TerracedPlacement:
    """Decides φ for nodes whose kernels are of one kind; see the module."""

    def __init__(self, kernel: Kernel, options: TerracedOptions | None = None) -> None:
        self._kernel = kernel
        self._options = options or TerracedOptions()

    def place(self, problem: Problem) -> Placement:
        """Deterministic; stays as near to `problem.previous` as the target allows."""
        if not problem.demand.tokens_per_s:
            return Placement(MappingProxyType({}))
        ground = survey(problem)
        level_ground = terrain(ground, self._kernel, self._options.slack)
        packing = Packing(ground, level_ground, self._options.hot, self._options.minor)
        packing.keep()
        packing.release()
        packing.fill()
        return packing.room.placement()
