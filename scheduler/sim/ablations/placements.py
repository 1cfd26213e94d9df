"""Place with one idea of ours taken away, or by rank ceilings in place of forecasts."""

from dataclasses import dataclass, replace
from types import MappingProxyType

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import PlacementPolicy, Problem
from scheduler.cluster.state import EMPTY_PLACEMENT, Placement, Share
from scheduler.sim.ablations.ceiling_problem import ceiling_problem, problem_arrays
from scheduler.sim.ablations.packing import Packing


@dataclass(frozen=True, slots=True)
class RankCeilingOptions:
    """`slack`: how far, relatively, utilisation may exceed the least possible before anything moves; `hot`:
    the part of a node's planned time from which an adapter gets a second copy; `minor`: shares too small to
    keep."""

    slack: float = 0.0
    hot: float = 0.5
    minor: float = 0.2


class RankCeilingPlacement:
    """Decides φ for nodes whose kernels are of one kind; see the module."""

    def __init__(self, kernel: Kernel, options: RankCeilingOptions | None = None) -> None:
        self._kernel = kernel
        self._options = options or RankCeilingOptions()

    def place(self, problem: Problem) -> Placement:
        """Stay as near to `problem.previous` as the target allows. The same problem gives the same placement."""
        if not problem.demand.tokens_per_s:
            return Placement(MappingProxyType({}))
        arrays = problem_arrays(problem)
        ceilings = ceiling_problem(arrays, self._kernel, self._options.slack)
        packing = Packing(arrays, ceilings, self._options.hot, self._options.minor)
        packing.keep()
        packing.release()
        packing.fill()
        return packing.builder.placement()


class WholePlacement:
    """No splitting: every adapter whole on the node of its largest share."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy

    def place(self, problem: Problem) -> Placement:
        """Place as the policy, but for the shares; it sees its own unsplit placement as the one before."""
        placed = self._policy.place(problem).shares
        homes = {ref: max(shares, key=lambda share: share.part).node for ref, shares in placed.items()}
        return Placement(MappingProxyType({ref: (Share(node, 1.0),) for ref, node in homes.items()}))


class ForgetfulPlacement:
    """No permutation: placed anew each time, whatever lies where."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy

    def place(self, problem: Problem) -> Placement:
        """Place as the policy would for empty nodes."""
        nodes = tuple(replace(state, held=()) for state in problem.nodes)
        return self._policy.place(Problem(problem.demand, nodes, EMPTY_PLACEMENT))
