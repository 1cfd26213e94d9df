"""Further copies, so that routing has a choice and a crash finds the next node ready."""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from lora.adapter import AdapterRef
from scheduler.cluster.placement.builder import AssignmentBuilder
from scheduler.cluster.state import NodeState

STANDBY = 1e-4  # φ of a standby: it is there for the router, not for the plan

_TRIES = 8  # nodes that are asked for room before a copy is given up

_Heap = list[tuple[int, int]]  # (adapters that the node stands by for, node)


class Replicas:
    """Chooses them so that nodes of one ceiling stand by for as many. `ceilings` are the largest rank of each node
    (all alike where ranks do not disturb each other), `homes` the nodes that have an adapter's bytes already."""

    def __init__(
        self,
        nodes: tuple[NodeState, ...],
        ceilings: list[int],
        room: AssignmentBuilder,
        homes: Mapping[AdapterRef, tuple[int, ...]],
    ) -> None:
        self._zones = [state.zone for state in nodes]
        self._ceilings, self._room, self._homes = ceilings, room, homes
        self._groups: dict[int, dict[str, _Heap]] = {}  # by ceiling and zone
        for node, ceiling in enumerate(ceilings):
            self._groups.setdefault(ceiling, {}).setdefault(self._zones[node], []).append((0, node))
        for zones in self._groups.values():
            for heap in zones.values():
                heapify(heap)

    def add(self, ref: AdapterRef) -> None:
        """Give `ref` a copy on a node of the ceiling of its first, and one on the nearest ceiling above; on the
        nearest below where there is neither. In other zones than it is in if there is room there."""
        taken = self._room.holders(ref)
        if not taken:
            return
        ceiling = self._ceilings[taken[0]]
        above = min((level for level in self._groups if level > ceiling), default=None)
        below = max((level for level in self._groups if level < ceiling), default=None)
        added = [self._copy(ref, level) for level in (ceiling, above) if level is not None]
        if below is not None and len(taken) == 1 and not any(added):
            self._copy(ref, below)

    def _copy(self, ref: AdapterRef, level: int) -> bool:
        """One more copy on that level, if there is a node for it."""
        taken = self._room.holders(ref)
        zones = {self._zones[node] for node in taken}
        homes = [node for node in self._homes.get(ref, ()) if self._ceilings[node] == level]
        for apart in (True, False):
            for node in homes:
                if (self._zones[node] not in zones) is apart and self._can_take(ref, node):
                    self._room.take(ref, node, STANDBY, 0.0)
                    return True
            for zone, heap in self._groups[level].items():
                if (zone not in zones) is apart and self._take_least(ref, heap):
                    return True
        return False

    def _take_least(self, ref: AdapterRef, heap: _Heap) -> bool:
        """On the node of `heap` that stands by for least, of those that can."""
        passed: _Heap = []
        found = False
        while heap and not found and len(passed) < _TRIES:
            copies, node = heappop(heap)
            found = self._can_take(ref, node)
            passed.append((copies + found, node))
            if found:
                self._room.take(ref, node, STANDBY, 0.0)
        for each in passed:
            heappush(heap, each)
        return found

    def _can_take(self, ref: AdapterRef, node: int) -> bool:
        return node not in self._room.holders(ref) and self._room.fits(ref, node)
