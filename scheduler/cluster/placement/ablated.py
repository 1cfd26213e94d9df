"""Placements with one idea taken away, to see what it is worth: each wraps the policy that has it."""

from dataclasses import replace
from types import MappingProxyType

from scheduler.cluster.placement.base import PlacementPolicy, Problem
from scheduler.cluster.state import EMPTY_PLACEMENT, Placement, Share


class WholePlacement:
    """No splitting: every adapter whole on the node of its largest share."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy

    def place(self, problem: Problem) -> Placement:
        """As the policy, but for the shares; it sees its own unsplit placement as the one before."""
        placed = self._policy.place(problem).shares
        homes = {ref: max(shares, key=lambda share: share.part).node for ref, shares in placed.items()}
        return Placement(MappingProxyType({ref: (Share(node, 1.0),) for ref, node in homes.items()}))


class ForgetfulPlacement:
    """No permutation: placed anew each time, whatever lies where."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy

    def place(self, problem: Problem) -> Placement:
        """As the policy would for empty nodes."""
        nodes = tuple(replace(state, held=()) for state in problem.nodes)
        return self._policy.place(Problem(problem.demand, nodes, EMPTY_PLACEMENT))
