"""The two placements that S-LoRA's evaluation compares with: at random, and contiguously. Neither looks at
load."""

from types import MappingProxyType

import numpy as np

from scheduler.cluster.placement.base import Problem, surviving
from scheduler.cluster.state import Placement, Share


class RandomPlacement:
    """Each adapter whole on a node drawn uniformly; it stays there as long as the node does."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def place(self, problem: Problem) -> Placement:
        """One draw for each adapter that has no node."""
        homes = {}
        for ref in problem.demand.tokens_per_s:
            before = surviving(problem, ref)
            node = before[0][0] if before else problem.nodes[int(self._rng.integers(len(problem.nodes)))].node
            homes[ref] = (Share(node, 1.0),)
        return Placement(MappingProxyType(homes))


class ContiguousPlacement:
    """The adapters in order of name, cut into as many runs of equal length as there are nodes."""

    def place(self, problem: Problem) -> Placement:
        """Run i goes to node i."""
        refs = sorted(problem.demand.tokens_per_s, key=lambda ref: (ref.name, ref.digest))
        count = len(problem.nodes)
        homes = {
            ref: (Share(problem.nodes[at * count // len(refs)].node, 1.0),) for at, ref in enumerate(refs)
        }
        return Placement(MappingProxyType(homes))
