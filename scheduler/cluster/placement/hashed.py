"""Rendezvous hashing as a placement: one home for each adapter that depends on nothing but names."""

from types import MappingProxyType

from scheduler.cluster.placement.base import Problem
from scheduler.cluster.routing.rendezvous import highest
from scheduler.cluster.state import Placement, Share


class HashedPlacement:
    """Each adapter whole on the node whose hash with its digest is highest."""

    def place(self, problem: Problem) -> Placement:
        """Looks at neither load nor memory."""
        names = [state.node for state in problem.nodes]
        homes = {ref: (Share(highest(ref, names), 1.0),) for ref in problem.demand.tokens_per_s}
        return Placement(MappingProxyType(homes))
