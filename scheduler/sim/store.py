"""The adapters in one simulated node's memory: those that the coordinator keeps there, and those of requests.

Stands in for the engine's adapter store: pages that lie as there, given by the same policy, in steps that begin
when steps do there. Bytes only take time here.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from lora.adapter import AdapterRef
from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, ResidencyPolicy, Usage
from lora.memory.page_allocator import PageAllocator
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.residency import CheapestWindow
from scheduler.sim.clock import Action
from scheduler.sim.network import CopySpeeds

Transfer = Callable[[AdapterRef, tuple[str, ...], Action], None]
_UNUSED = Usage()


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a simulated store is made of: rank pages, who makes room, and what a reload is taken to cost."""

    page_bytes: int = 2 << 20
    policy: ResidencyPolicy = field(default_factory=CheapestWindow)
    speeds: CopySpeeds = field(default_factory=CopySpeeds)


@dataclass(slots=True)
class _Adapter:
    """One adapter: it has a `run` of pages while it is `here` or arriving, and `leases` while a step runs it."""

    ref: AdapterRef
    leases: int = 0
    run: PageRun | None = None
    here: bool = False
    usage: Usage = _UNUSED


class SimStore:
    """Owner of one node's residency; `changed` is called when an adapter has arrived.

    What the coordinator keeps counts as what a live request uses. It goes only for the request that is first in
    line, as the policy allows, and then comes again.
    """

    def __init__(
        self, agent: NodeAgent, memory_bytes: int, spec: StoreSpec, transfer: Transfer, changed: Action
    ) -> None:
        self._agent, self._memory_bytes, self._spec = agent, memory_bytes, spec
        self._transfer, self._changed = transfer, changed
        self._pages = PageAllocator(memory_bytes // spec.page_bytes)
        self._adapters: dict[str, _Adapter] = {}  # all that were ever asked for, by digest
        self._placed: dict[str, _Adapter] = {}  # those with pages
        self._ready: dict[str, None] = {}
        self._users: dict[str, int] = {}  # live requests
        self._requested: list[_Adapter] = []  # absent, and what requests wait for: the most urgent first
        self._pulls: dict[str, tuple[str, ...]] = {}  # what the coordinator waits for, and the sources
        self._draining: dict[str, AdapterRef] = {}  # dropped, and still in use
        self._step = 0
        self._planning = False
        self.used_bytes = 0  # of what is here or on its way
        self.fetches = 0
        self.evictions = 0

    @property
    def ready(self) -> Collection[str]:
        """Digests of what is here."""
        return self._ready.keys()

    @property
    def is_fetching(self) -> bool:
        """True if bytes are on their way."""
        return len(self._placed) > len(self._ready)

    @property
    def room_bytes(self) -> int:
        """Memory that is neither kept for the coordinator nor needed by requests, those that wait included."""
        asked = (self._adapters[digest].ref for digest in self._users)
        needed = sum(ref.nbytes for ref in asked if not self._agent.holds(ref))
        return max(0, self._memory_bytes - self._agent.used_bytes - needed)

    def cached(self) -> tuple[AdapterRef, ...]:
        """List what is here and may go at any time."""
        here = (self._placed[digest].ref for digest in self._ready)
        return tuple(ref for ref in here if not self._agent.has(ref))

    # Requests

    def retain(self, adapter: AdapterRef) -> bool:
        """Hold on to `adapter` for one request; False, and nothing done, if it has no room beside what is kept."""
        if adapter.is_base:
            return True
        if not self._can_ever_fit(adapter):
            return False
        self._users[adapter.digest] = self._users.get(adapter.digest, 0) + 1
        self._known(adapter)
        return True

    def release(self, adapter: AdapterRef) -> None:
        """Undo one `retain`."""
        if adapter.is_base:
            return
        self._users[adapter.digest] -= 1
        if not self._users[adapter.digest]:
            del self._users[adapter.digest]
            self._free_dropped()
            self._advance()

    def is_retained(self, adapter: AdapterRef) -> bool:
        """Return whether requests hold on to `adapter`."""
        return adapter.is_base or adapter.digest in self._users

    def prefetch(self, adapters: Iterable[AdapterRef]) -> None:
        """Ask for these, the most urgent first, in place of what was asked for before."""
        self._requested = [each for each in self._known_of(adapters) if each.run is None]
        self._advance()

    def hopeless(self) -> list[AdapterRef]:
        """List what requests wait for and what is kept has taken the room of for good."""
        asked = [self._adapters[digest] for digest in self._users]
        return [each.ref for each in asked if each.run is None and not self._can_ever_fit(each.ref)]

    # Steps

    def begin_step(self) -> Collection[str]:
        """Return the digests of what is here, which stays until `acquire`, or the next step if none runs."""
        idle, self._planning = self._planning, False
        self._step += 1
        self._advance(Force.IDLE if idle else Force.NOT_RUNNING)
        self._planning = True
        return self.ready

    def acquire(self, adapters: Iterable[AdapterRef]) -> None:
        """Pin what the step runs; what waits may displace the rest from now on."""
        for each in self._known_of(adapters):
            each.leases += 1
            each.usage = self._spec.policy.ran(each.usage, self._step)
        self._planning = False
        self._advance()

    def end_step(self, adapters: Iterable[AdapterRef]) -> None:
        """Undo one `acquire`."""
        for each in self._known_of(adapters):
            each.leases -= 1
        self._advance()

    def would_go_on(self) -> bool:
        """Return whether another step, though it may run nothing, would find pages for what waits."""
        if self._requested:
            first = self._requested[0]
            force = Force.IDLE if first.ref.digest in self._users else Force.UNUSED
            return self._victims(first, force, self._step + 1) is not None
        absent = (self._adapters[digest] for digest in self._pulls)
        return any(self._victims(each, Force.UNUSED, self._step + 1) is not None for each in absent)

    # The coordinator

    def pull(self, adapter: AdapterRef, sources: tuple[str, ...]) -> None:
        """Get `adapter` on the coordinator's behalf."""
        each = self._known(adapter)
        if each.here:
            self._agent.arrived(adapter)
        elif each.run is None:
            self._pulls[adapter.digest] = sources
            self._advance()

    def drop(self, adapter: AdapterRef) -> None:
        """Keep `adapter` no more than others when it is not in use, unless it is kept again by then."""
        self._draining[adapter.digest] = adapter
        self._free_dropped()
        self._advance()

    def check(self) -> None:
        """Assert that the pages of all that is here or on its way are apart, and within memory."""
        runs = sorted(each.run for each in self._placed.values() if each.run is not None)
        assert len(runs) == len(self._placed), f"{self._agent.node} has adapters without pages"
        ends = [0, *(run.stop for run in runs)]
        apart = all(end <= run.start for end, run in zip(ends, runs, strict=False))
        assert apart, f"{self._agent.node} has two adapters in one page"
        assert ends[-1] * self._spec.page_bytes <= self._memory_bytes, (
            f"{self._agent.node} exceeds its memory"
        )

    def _known(self, adapter: AdapterRef) -> _Adapter:
        return self._adapters.setdefault(adapter.digest, _Adapter(adapter))

    def _known_of(self, adapters: Iterable[AdapterRef]) -> list[_Adapter]:
        """The base model needs no pages."""
        return [self._known(ref) for ref in adapters if not ref.is_base]

    def _can_ever_fit(self, adapter: AdapterRef) -> bool:
        if self._pages_for(adapter) > self._pages.num_pages:
            return False
        if adapter.digest in self._ready or self._agent.holds(adapter):
            return True
        return self._agent.used_bytes + adapter.nbytes <= self._memory_bytes

    def _pages_for(self, adapter: AdapterRef) -> int:
        return -(-adapter.nbytes // self._spec.page_bytes)

    def _free_dropped(self) -> None:
        """Tell the agent what was dropped and is not in use."""
        for digest, ref in list(self._draining.items()):
            if not self._agent.has(ref) or self._agent.keeps(ref):
                del self._draining[digest]
            elif digest not in self._users:
                del self._draining[digest]
                self._agent.freed(ref)

    # Pages

    def _advance(self, force: Force = Force.NOT_RUNNING) -> None:
        """Start what there is room for, what requests wait for first: only the first may displace others' adapters.

        Nobody waits for the coordinator's pulls, and small ones would take the room again and again.
        """
        if self._planning:
            force = Force.FREE_PAGES
        due: list[tuple[_Adapter, tuple[str, ...]]] = []
        waiting, self._requested = [each for each in self._requested if each.run is None], []
        for each in waiting:
            urgent = each is waiting[0] and each.ref.digest in self._users
            if self._reserve(each, force if urgent else min(force, Force.UNUSED)):
                due.append((each, self._sources(each.ref)))
            else:
                self._requested.append(each)
        for digest, sources in list(self._pulls.items()):
            each = self._adapters[digest]
            if each.run is not None or not self._agent.holds(each.ref):
                del self._pulls[digest]
            elif not self._requested and self._reserve(each, min(force, Force.UNUSED)):
                del self._pulls[digest]
                due.append((each, sources))
        for each, sources in due:
            self._fetch(each, sources)

    def _sources(self, adapter: AdapterRef) -> tuple[str, ...]:
        shares = self._agent.table.shares.get(adapter, ())
        return tuple(share.node for share in shares if share.node != self._agent.node)

    def _reserve(self, each: _Adapter, force: Force) -> bool:
        """Give an absent adapter its pages, displacing others as far as `force` allows; False if it must wait."""
        count = self._pages_for(each.ref)
        run = self._pages.allocate(count)
        if run is None and force > Force.FREE_PAGES:
            victims = self._victims(each, force, self._step)
            if victims is None:
                return False
            for victim in victims:
                self._displace(victim)
            run = self._pages.allocate(count)
        if run is None:
            return False
        each.run = run
        self._placed[each.ref.digest] = each
        self.used_bytes += each.ref.nbytes
        return True

    def _fetch(self, each: _Adapter, sources: tuple[str, ...]) -> None:
        self.fetches += 1
        self._transfer(each.ref, sources, lambda: self._arrive(each))

    def _arrive(self, each: _Adapter) -> None:
        each.here = True
        each.usage = self._spec.policy.placed(each.usage, self._step)
        self._ready[each.ref.digest] = None
        self._agent.arrived(each.ref)
        self._advance()
        self._changed()

    def _displace(self, each: _Adapter) -> None:
        assert each.run is not None, f"{each.ref.name} has no pages to give up"
        self._pages.free(each.run)
        each.run, each.here = None, False
        del self._placed[each.ref.digest], self._ready[each.ref.digest]
        self.used_bytes -= each.ref.nbytes
        self.evictions += 1
        self._agent.displaced(each.ref)
        if self._agent.holds(each.ref):
            self._pulls[each.ref.digest] = self._sources(each.ref)

    def _victims(self, each: _Adapter, force: Force, step: int) -> list[_Adapter] | None:
        """Find whom to displace for `each`'s sake; None if it must wait."""
        request = PageRequest(self._pages_for(each.ref), self._pages.num_pages, force, step)
        placed = {found.run: found for found in self._placed.values() if found.run is not None}
        occupants = [
            Occupant(run, self._claim(found), found.usage, self._spec.speeds.reload_s(found.ref.nbytes))
            for run, found in placed.items()
        ]
        chosen = self._spec.policy.displaced(request, occupants)
        return None if chosen is None else [placed[occupant.run] for occupant in chosen]

    def _claim(self, each: _Adapter) -> Claim:
        if each.leases or not each.here:
            return Claim.PINNED
        used = each.ref.digest in self._users or self._agent.has(each.ref)
        return Claim.RETAINED if used else Claim.UNUSED
