"""A placement in the making: what each node has taken on, and how much memory is left on it.

One writer, the policy that packs; nothing here decides where anything goes.
"""

from types import MappingProxyType

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.state import Placement, normalised


class AssignmentBuilder:
    """Nodes are numbered as in `problem.nodes`. `load` is utilisation, `free_bytes` memory left; both are
    float64 arrays of [nodes]. Taking adds up: an adapter's parts on one node are one copy, whose bytes count
    once."""

    def __init__(self, problem: Problem) -> None:
        self._nodes = problem.nodes
        self._parts: dict[AdapterRef, dict[int, float]] = {ref: {} for ref in problem.demand.tokens_per_s}
        self.load = np.zeros(len(problem.nodes))
        self.free_bytes = np.array([float(state.memory_bytes) for state in problem.nodes])

    def take(self, ref: AdapterRef, node: int, part: float, load: float) -> None:
        """Put `part` of the adapter's traffic, which is `load` of the node's time, on `node`."""
        parts = self._parts[ref]
        if node not in parts:
            self.free_bytes[node] -= ref.nbytes
        parts[node] = parts.get(node, 0.0) + part
        self.load[node] += load

    def fits(self, ref: AdapterRef, node: int) -> bool:
        """Return whether `node` holds `ref` or has the memory to."""
        return node in self._parts[ref] or bool(self.free_bytes[node] >= ref.nbytes)

    def holders(self, ref: AdapterRef) -> tuple[int, ...]:
        """Return the nodes that have taken a part of `ref`, the earliest first."""
        return tuple(self._parts[ref])

    def placement(self) -> Placement:
        """Return what has been taken, each adapter's parts scaled to sum to 1."""
        named = {
            ref: normalised((self._nodes[node].node, max(part, 1e-12)) for node, part in parts.items())
            for ref, parts in self._parts.items()
            if parts
        }
        return Placement(MappingProxyType(named))
