"""Give pinned adapters the copies that were asked for, whatever policy has placed the rest.

A further copy goes where the bytes are already, else to a zone that has none, else where there is most room. Where no
node has room, what is least asked for by byte gives way: first what has another copy or finds room elsewhere. What
finds none is left out, as it is by every policy where memory is short; no pinned adapter is.
"""

from collections.abc import Mapping, Set
from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.replicas import REPLICA_PART
from scheduler.cluster.state import NodeState, Placement, normalised

Pins = Mapping[AdapterRef, int]
"""Adapter → the least number of its copies. More than there are nodes means one on each."""
Unable = Mapping[AdapterRef, Set[str]]
"""Adapter → the nodes that could not get it of late."""


def with_pins(problem: Problem, placement: Placement, pins: Pins, unable: Unable) -> Placement:
    """Return the placement with the copies that `pins` lack; the same one if none does."""
    if not pins:
        return placement
    due = [ref for ref in pins if ref in problem.demand.tokens_per_s]
    lacking = _Pinning(problem, placement, due, unable)
    # The largest first: what is small still finds room then.
    for ref in sorted(due, key=lambda ref: (-ref.nbytes, ref.digest)):
        lacking.copy(ref, pins[ref])
    return lacking.placement(placement)


class _Pinning:
    """A placement in the making: the parts of each adapter by node, and the memory that is left on each."""

    def __init__(
        self, problem: Problem, placement: Placement, pinned: list[AdapterRef], unable: Unable
    ) -> None:
        self._rates, self._unable = problem.demand.tokens_per_s, unable
        self._nodes: dict[str, NodeState] = {state.node: state for state in problem.nodes}
        self._held = {state.node: frozenset(state.held) for state in problem.nodes}
        self._pinned = frozenset(pinned)
        self._parts = {
            ref: {share.node: share.part for share in shares} for ref, shares in placement.shares.items()
        }
        self._free = {state.node: state.memory_bytes for state in problem.nodes}
        self._on: dict[str, dict[AdapterRef, None]] = {node: {} for node in self._nodes}
        for ref, parts in self._parts.items():
            for node in parts:
                if node in self._nodes:
                    self._free[node] -= ref.nbytes
                    self._on[node][ref] = None
        self._changed = False

    def copy(self, ref: AdapterRef, copies: int) -> None:
        """Add copies of one adapter until it has so many, or one on each node that can have it."""
        while self._copies(ref) < copies and (node := self._best(ref)) is not None:
            self._make_room(ref, node)
            self._put(ref, node, REPLICA_PART if self._copies(ref) else 1.0)

    def placement(self, before: Placement) -> Placement:
        """Return what has become of it."""
        if not self._changed:
            return before
        shares = {
            ref: before.shares[ref]
            if parts == {share.node: share.part for share in before.shares.get(ref, ())}
            else normalised(parts.items())
            for ref, parts in self._parts.items()
            if parts
        }
        return Placement(MappingProxyType(shares))

    def _copies(self, ref: AdapterRef) -> int:
        """Count an adapter's copies on nodes that stay."""
        return sum(node in self._nodes for node in self._parts.get(ref, ()))

    def _best(self, ref: AdapterRef) -> str | None:
        """Choose the node of one more copy; None if none could hold it even without what is not pinned."""
        parts = self._parts.get(ref, {})
        zones = {self._nodes[node].zone for node in parts if node in self._nodes}
        unable = self._unable.get(ref, frozenset())
        able = [node for node in self._nodes if node not in parts and node not in unable]
        able = [node for node in able if self._free[node] + self._yielding(node) >= ref.nbytes]
        if not able:
            return None

        def order(node: str) -> tuple[bool, bool, bool, int, str]:
            lacks_room, elsewhere = self._free[node] < ref.nbytes, ref not in self._held[node]
            return lacks_room, elsewhere, self._nodes[node].zone in zones, -self._free[node], node

        return min(able, key=order)

    def _yielding(self, node: str) -> int:
        """Count the bytes that would give way on a node."""
        return sum(ref.nbytes for ref in self._on[node] if ref not in self._pinned)

    def _make_room(self, ref: AdapterRef, node: str) -> None:
        """Have others leave a node until an adapter fits there."""
        loose = [other for other in self._on[node] if other not in self._pinned]
        loose.sort(key=lambda other: (self._rates.get(other, 0.0) / max(1, other.nbytes), other.digest))
        loose.sort(key=lambda other: len(self._parts[other]) == 1 and self._other_home(other, node) is None)
        for other in loose:
            if self._free[node] >= ref.nbytes:
                return
            home = self._other_home(other, node) if len(self._parts[other]) == 1 else None
            part = self._parts[other].pop(node)
            del self._on[node][other]
            self._free[node] += other.nbytes
            if home is not None:
                self._put(other, home, part)

    def _other_home(self, ref: AdapterRef, node: str) -> str | None:
        """Find another node with room for an adapter, the one with most."""
        unable = self._unable.get(ref, frozenset())
        roomy = [
            each
            for each in self._nodes
            if each != node and each not in unable and self._free[each] >= ref.nbytes
        ]
        return max(roomy, key=lambda each: (ref in self._held[each], self._free[each], each), default=None)

    def _put(self, ref: AdapterRef, node: str, part: float) -> None:
        self._parts.setdefault(ref, {})[node] = part
        self._on[node][ref] = None
        self._free[node] -= ref.nbytes
        self._changed = True
