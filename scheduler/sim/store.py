"""The adapters in one simulated node's memory: those it keeps for the coordinator, and those it cached for
requests.

Stands in for the engine's adapter store: the same promises (what is in use stays, what is kept stays until
dropped, memory is never exceeded), bytes that take time instead of bytes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lora.adapter import AdapterRef
from scheduler.cluster.eviction import EvictionPolicy, Usage
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.sim.clock import Action, Clock

Transfer = Callable[[AdapterRef, Sequence[str], Action], None]


@dataclass(slots=True)
class _Wanted:
    """An adapter that is to come as soon as there is room."""

    ref: AdapterRef
    sources: tuple[str, ...]


class SimStore:
    """Owner of one node's residency; `changed` is called when an adapter has arrived."""

    def __init__(
        self,
        agent: NodeAgent,
        memory_bytes: int,
        eviction: EvictionPolicy,
        clock: Clock,
        transfer: Transfer,
        changed: Action,
    ) -> None:
        self._agent, self._memory_bytes, self._eviction, self._clock = agent, memory_bytes, eviction, clock
        self._transfer, self._changed = transfer, changed
        self._here: dict[str, AdapterRef] = {}  # by digest
        self._coming: dict[str, AdapterRef] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._draining: dict[str, AdapterRef] = {}  # dropped, and still here
        self._users: dict[str, int] = {}
        self._usage: dict[str, Usage] = {}  # also of what is not here any more
        self.used_bytes = 0  # of what is here or on its way
        self.fetches = 0

    @property
    def ready(self) -> Collection[str]:
        """Digests of what is here."""
        return self._here.keys()

    @property
    def is_short(self) -> bool:
        """True if something waits for room."""
        return bool(self._wanted)

    @property
    def room_bytes(self) -> int:
        """Memory that is neither kept for the coordinator nor needed by requests, those that wait included."""
        asked = (self._usage[digest].ref for digest in self._users)
        needed = sum(ref.nbytes for ref in asked if not self._agent.holds(ref))
        return max(0, self._memory_bytes - self._agent.used_bytes - needed)

    def cached(self) -> tuple[AdapterRef, ...]:
        """What is here and may go at any time."""
        return tuple(ref for ref in self._here.values() if not self._agent.has(ref))

    def is_coming(self, adapter: AdapterRef) -> bool:
        """True if it is on its way or will be when there is room."""
        return adapter.digest in self._coming or adapter.digest in self._wanted

    def is_arriving(self, adapter: AdapterRef) -> bool:
        """True if its bytes are on their way."""
        return adapter.digest in self._coming

    def use(self, adapter: AdapterRef, sources: tuple[str, ...]) -> bool:
        """Hold on to `adapter` for one request, and get it if it is not here; False, and nothing done, if
        there can be no room for it beside what is kept."""
        if not self._can_ever_fit(adapter):
            return False
        self._users[adapter.digest] = self._users.get(adapter.digest, 0) + 1
        self._usage.setdefault(adapter.digest, Usage(adapter)).use(self._clock.now)
        self.want(adapter, sources)
        return True

    def release(self, adapter: AdapterRef) -> None:
        """One request has ended."""
        self._usage[adapter.digest].used_s = self._clock.now
        self._users[adapter.digest] -= 1
        if not self._users[adapter.digest]:
            del self._users[adapter.digest]
            self.tidy()

    def want(self, adapter: AdapterRef, sources: tuple[str, ...]) -> None:
        """Get `adapter`, unless it is here or coming."""
        if adapter.digest in self._here:
            self._agent.arrived(adapter)
        elif not self.is_coming(adapter):
            self._wanted[adapter.digest] = _Wanted(adapter, sources)
        self.tidy()

    def hopeless(self) -> list[AdapterRef]:
        """Adapters that wait for room which what is kept has taken for good."""
        return [each.ref for each in self._wanted.values() if not self._can_ever_fit(each.ref)]

    def forget(self, adapter: AdapterRef) -> None:
        """Want it no more."""
        self._wanted.pop(adapter.digest, None)

    def press(self, adapter: AdapterRef, running: Collection[AdapterRef]) -> None:
        """Make room for `adapter`, whose request is the first in line, if need be by freeing what only requests
        that wait need: else each of them would hold what another waits for. What is freed is wanted anew."""
        if adapter.digest not in self._wanted:
            return
        waited = [ref for ref in self.cached() if ref.digest in self._users and ref not in running]
        while waited and not self._make_room(adapter.nbytes):
            self._wanted[waited[-1].digest] = _Wanted(waited[-1], ())
            self._free(waited.pop())
        self._begin_if_room(self._wanted[adapter.digest])

    def drop(self, adapter: AdapterRef) -> None:
        """Free `adapter` when it is not in use any more, unless it is kept again by then."""
        self._draining[adapter.digest] = adapter
        self.tidy()

    def tidy(self) -> None:
        """Free what was dropped and is not in use; start what there is room for, what requests wait for first:
        nobody waits for the coordinator's other pulls, and small ones would take the room again and again."""
        for digest, ref in list(self._draining.items()):
            if not self._is_dropped(ref):
                del self._draining[digest]
            elif digest not in self._users:
                del self._draining[digest]
                self._agent.freed(ref)
        for each in sorted(self._wanted.values(), key=lambda each: each.ref.digest not in self._users):
            if not self._is_needed(each.ref):
                del self._wanted[each.ref.digest]
            elif not self._begin_if_room(each) and each.ref.digest in self._users:
                break

    def _begin_if_room(self, wanted: _Wanted) -> bool:
        ref = wanted.ref
        if not self._make_room(ref.nbytes):
            return False
        del self._wanted[ref.digest]
        self._coming[ref.digest] = ref
        self.used_bytes += ref.nbytes
        self.fetches += 1
        self._transfer(ref, wanted.sources, lambda: self._arrive(ref))
        return True

    def _free(self, ref: AdapterRef) -> None:
        self.used_bytes -= ref.nbytes
        del self._here[ref.digest]

    def _can_ever_fit(self, adapter: AdapterRef) -> bool:
        if adapter.digest in self._here or self._agent.holds(adapter):
            return True
        return self._agent.used_bytes + adapter.nbytes <= self._memory_bytes

    def _arrive(self, ref: AdapterRef) -> None:
        del self._coming[ref.digest]
        self._here[ref.digest] = ref
        self._agent.arrived(ref)
        self.tidy()
        self._changed()

    def _is_needed(self, ref: AdapterRef) -> bool:
        return self._agent.holds(ref) or ref.digest in self._users

    def _is_dropped(self, ref: AdapterRef) -> bool:
        return self._agent.has(ref) and not self._agent.keeps(ref)

    def _make_room(self, nbytes: int) -> bool:
        """Evict what is cached and unused, in the policy's order, until `nbytes` fit; nothing if they
        cannot."""
        free = self._memory_bytes - self.used_bytes
        if free >= nbytes:
            return True
        idle = [ref for ref in self.cached() if ref.digest not in self._users]
        if free + sum(ref.nbytes for ref in idle) < nbytes:
            return False
        for usage in self._eviction.order([self._used(ref) for ref in idle], self._clock.now):
            if self._memory_bytes - self.used_bytes >= nbytes:
                break
            self._free(usage.ref)
        return True

    def _used(self, ref: AdapterRef) -> Usage:
        return self._usage.setdefault(ref.digest, Usage(ref))
