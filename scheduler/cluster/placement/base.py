"""The seam of placement policies, and the two measures that they are judged by.

A policy sees nodes, demand and the placement before, and returns the placement to be; how to get from one to
the other, and whether it is worth the way, is the coordinator's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.state import Demand, NodeState, Placement


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be placed, on what (at least one node), and where it was; `previous` may name nodes that are
    gone."""

    demand: Demand
    nodes: tuple[NodeState, ...]
    previous: Placement


Measure = Callable[[Problem, Placement], Mapping[str, float]]
"""The load of each node under a placement, 1 being all it should take."""


class PlacementPolicy(Protocol):
    """Decides φ. The same problem gives the same placement, but for a policy that draws from an rng of its
    own."""

    def place(self, problem: Problem) -> Placement:
        """Return shares, summing to 1, for every adapter of the demand that fits in the nodes' memory."""
        ...


def sustained(node: NodeState, kernel: Kernel, rank: int, largest: int) -> float:
    """Return the tokens/s that `node` sustains of an adapter of `rank` when it serves ranks up to `largest`.

    Kernels that pad make every token cost what the largest rank costs; S-LoRA's lie between, taken as the
    mean of the seconds of both. Under fixed kernels the operating points of all ranks are alike already.
    """
    if not kernel.mixes:
        return node.sustains(rank)
    if kernel is Kernel.PADDED:
        return node.sustains(max(rank, largest))
    return 2 / (1 / node.sustains(rank) + 1 / node.sustains(max(rank, largest)))


class Utilisation:
    """The measure that operating points give."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __call__(self, problem: Problem, placement: Placement) -> Mapping[str, float]:
        """Measure each node's `utilisation`."""
        return utilisation(problem, placement, self._kernel)


def utilisation(problem: Problem, placement: Placement, kernel: Kernel) -> Mapping[str, float]:
    """Sum up φ·TPS / OP of each node, 1 being all it sustains; the largest rank is over all that is placed
    there."""
    nodes = {state.node: state for state in problem.nodes}
    largest = dict.fromkeys(nodes, 0)
    tokens: dict[tuple[str, int], float] = {}
    for ref, shares in placement.shares.items():
        rate = problem.demand.tokens_per_s.get(ref, 0.0)
        for share in shares:
            if share.node in nodes:
                largest[share.node] = max(largest[share.node], ref.rank)
                key = share.node, ref.rank
                tokens[key] = tokens.get(key, 0.0) + share.part * rate
    load = dict.fromkeys(nodes, 0.0)
    for (node, rank), rate in tokens.items():
        load[node] += rate / sustained(nodes[node], kernel, rank, largest[node])
    return load


def fetched_bytes(problem: Problem, placement: Placement) -> int:
    """Return bytes that nodes must fetch to hold what `placement` puts on them."""
    held = {state.node: frozenset(state.held) for state in problem.nodes}
    return sum(
        ref.nbytes
        for ref, shares in placement.shares.items()
        for share in shares
        if ref not in held.get(share.node, ())
    )


def surviving(problem: Problem, ref: AdapterRef) -> tuple[tuple[str, float], ...]:
    """Return the shares that `ref` had before on nodes that are still there, as (node, part)."""
    alive = {state.node for state in problem.nodes}
    return tuple(
        (share.node, share.part) for share in problem.previous.shares.get(ref, ()) if share.node in alive
    )
