"""Place further copies in other zones, so that what takes a whole zone away finds the others ready."""

from collections.abc import Mapping, Set
from heapq import heapify, heappop, heappush

from lora.adapter import AdapterRef
from scheduler.cluster.placement.builder import AssignmentBuilder
from scheduler.cluster.state import NodeState

REPLICA_PART = 1e-4  # φ of a replica: it is there for the day on which its home is lost, not for the plan

_TRIES = 8  # nodes that are asked for room before a copy is given up

_Heap = list[tuple[int, int]]  # (replicas on the node, node)


class Replicas:
    """Spreads replicas evenly over the nodes of one ceiling in other zones.

    `ceilings` are the largest rank of each node, all alike where ranks do not disturb each other. `homes` are
    the nodes that have an adapter's bytes already.
    """

    def __init__(
        self,
        nodes: tuple[NodeState, ...],
        ceilings: list[int],
        builder: AssignmentBuilder,
        homes: Mapping[AdapterRef, tuple[int, ...]],
    ) -> None:
        self._zones = [state.zone for state in nodes]
        self._ceilings, self._builder, self._homes = ceilings, builder, homes
        self._heaps: dict[int, dict[str, _Heap]] = {}  # by ceiling and zone
        for node, ceiling in enumerate(ceilings):
            self._heaps.setdefault(ceiling, {}).setdefault(self._zones[node], []).append((0, node))
        for zones in self._heaps.values():
            for heap in zones.values():
                heapify(heap)

    def add(self, ref: AdapterRef) -> None:
        """Give `ref` a copy in a zone that it is not in, if there is room.

        It goes to a node of its first node's ceiling, else of the nearest above, else of the nearest below.
        """
        taken = self._builder.holders(ref)
        zones = {self._zones[node] for node in taken}
        if not taken or len(zones) > 1:
            return
        own = self._ceilings[taken[0]]
        nearest = sorted(self._heaps, key=lambda level: (level < own, abs(level - own)))
        any(self._copy(ref, level, zones) for level in nearest)

    def _copy(self, ref: AdapterRef, ceiling: int, zones: Set[str]) -> bool:
        """Place one more copy at that ceiling but not in `zones`, and say whether there was a node for it."""
        for node in self._homes.get(ref, ()):
            if (
                self._ceilings[node] == ceiling
                and self._zones[node] not in zones
                and self._can_take(ref, node)
            ):
                self._builder.take(ref, node, REPLICA_PART, 0.0)
                return True
        heaps = self._heaps[ceiling].items()
        return any(self._take_least(ref, heap) for zone, heap in heaps if zone not in zones)

    def _take_least(self, ref: AdapterRef, heap: _Heap) -> bool:
        """Place a copy on the node of `heap` with the fewest replicas, of those that can take it."""
        passed: _Heap = []
        found = False
        while heap and not found and len(passed) < _TRIES:
            copies, node = heappop(heap)
            found = self._can_take(ref, node)
            passed.append((copies + found, node))
            if found:
                self._builder.take(ref, node, REPLICA_PART, 0.0)
        for each in passed:
            heappush(heap, each)
        return found

    def _can_take(self, ref: AdapterRef, node: int) -> bool:
        return node not in self._builder.holders(ref) and self._builder.fits(ref, node)
