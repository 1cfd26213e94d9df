"""Place as others do, to compare with: first fit, hashing, full replication, and S-LoRA's two placements."""

from collections.abc import Iterable
from hashlib import blake2b
from types import MappingProxyType

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.placement.base import Problem, surviving
from scheduler.cluster.placement.builder import AssignmentBuilder
from scheduler.cluster.state import Placement, Share, Shares


class FirstFitPlacement:
    """Each adapter, in order, whole on the first node with memory for it that stays within `target`
    utilisation; the least loaded one with memory where none does."""

    def __init__(self, target: float = 1.0) -> None:
        self._target = target

    def place(self, problem: Problem) -> Placement:
        """Place the adapters in one pass, in order of registration."""
        builder = AssignmentBuilder(problem)
        for ref, rate in problem.demand.tokens_per_s.items():
            added = np.array([rate / state.sustains(ref.rank) for state in problem.nodes])
            with_memory = np.flatnonzero(builder.free_bytes >= ref.nbytes)
            if not len(with_memory):
                continue
            after = (builder.load + added)[with_memory]
            fitting = np.flatnonzero(after <= self._target)
            node = int(with_memory[fitting[0] if len(fitting) else np.argmin(after)])
            builder.take(ref, node, 1.0, float(added[node]))
        return builder.placement()


class HashedPlacement:
    """Each adapter whole on the node whose hash with its digest is highest (Thaler and Ravishankar, 1998).

    A node that comes or goes moves only its own adapters.
    """

    def place(self, problem: Problem) -> Placement:
        """Look at neither load nor memory."""
        names = [state.node for state in problem.nodes]
        homes = {ref: (Share(_highest(ref, names), 1.0),) for ref in problem.demand.tokens_per_s}
        return Placement(MappingProxyType(homes))


def _highest(adapter: AdapterRef, nodes: Iterable[str]) -> str:
    """Find the node whose hash with the adapter's digest is highest."""
    return max(nodes, key=lambda node: blake2b(f"{adapter.digest}\n{node}".encode()).digest())


class ReplicatedPlacement:
    """One copy of each adapter on the node with most memory left, then copies on all other nodes; equal
    shares.

    The further copies are made in order of registration while there is memory.
    """

    def place(self, problem: Problem) -> Placement:
        """Look at no demand: the placement only changes when nodes or adapters do."""
        builder = AssignmentBuilder(problem)
        refs = list(problem.demand.tokens_per_s)
        for ref in refs:
            node = int(np.argmax(builder.free_bytes))
            if builder.fits(ref, node):
                builder.take(ref, node, 1.0, 0.0)
        for ref in refs:
            first = builder.holders(ref)
            for node in np.flatnonzero(builder.free_bytes >= ref.nbytes).tolist() if first else ():
                if node not in first:
                    builder.take(ref, node, 1.0, 0.0)
        return builder.placement()


class RandomPlacement:
    """Each adapter whole on a node drawn uniformly; it stays there as long as the node does."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def place(self, problem: Problem) -> Placement:
        """Draw once for each adapter that has no node."""
        homes: dict[AdapterRef, Shares] = {}
        for ref in problem.demand.tokens_per_s:
            before = surviving(problem, ref)
            node = before[0][0] if before else problem.nodes[int(self._rng.integers(len(problem.nodes)))].node
            homes[ref] = (Share(node, 1.0),)
        return Placement(MappingProxyType(homes))


class ContiguousPlacement:
    """The adapters in order of name, cut into as many runs of equal length as there are nodes."""

    def place(self, problem: Problem) -> Placement:
        """Place run i on node i."""
        refs = sorted(problem.demand.tokens_per_s, key=lambda ref: (ref.name, ref.digest))
        count = len(problem.nodes)
        homes = {
            ref: (Share(problem.nodes[at * count // len(refs)].node, 1.0),) for at, ref in enumerate(refs)
        }
        return Placement(MappingProxyType(homes))
