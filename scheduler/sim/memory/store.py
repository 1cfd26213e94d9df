"""The adapters in one simulated node's memory: those that the coordinator keeps there, and those of requests.

Stands in for the engine's adapter store: pages that lie as there, given by the same policy, in steps that begin
when steps do there. Bytes only take time here.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from lora.adapter import AdapterRef
from lora.memory.base import Force, ResidencyPolicy
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.residency import CheapestWindow
from scheduler.sim.clock import Action
from scheduler.sim.memory.host_copies import HostCopies
from scheduler.sim.memory.placed_adapters import PageRules, PlacedAdapters, SimAdapter
from scheduler.sim.network import CopySpeeds

Transfer = Callable[[AdapterRef, tuple[str, ...], Action], None]
"""Gets an adapter from a named node or the registry, then acts; only its own name: from the host's memory."""


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a simulated store is made of: rank pages, who makes room, and what a reload is taken to cost."""

    page_bytes: int = 2 << 20
    policy: ResidencyPolicy = field(default_factory=CheapestWindow)
    speeds: CopySpeeds = field(default_factory=CopySpeeds)


@dataclass(frozen=True, slots=True)
class AdapterMemory:
    """What adapters may take: `most_bytes` of the card, `first_pages` of them at first, and of the host."""

    most_bytes: int
    first_pages: int
    host_bytes: int = 0


class SimStore:
    """Owner of one node's residency; `changed` is called when an adapter has arrived.

    What the coordinator keeps counts as what a live request uses. It goes only for the request that is first in
    line, as the policy allows, and then comes again.
    """

    def __init__(
        self, agent: NodeAgent, memory: AdapterMemory, spec: StoreSpec, transfer: Transfer, changed: Action
    ) -> None:
        self._agent, self._memory_bytes, self._page_bytes = agent, memory.most_bytes, spec.page_bytes
        self._transfer, self._changed = transfer, changed
        self._host = HostCopies(memory.host_bytes)
        reload_s = spec.speeds.recall_s if memory.host_bytes else spec.speeds.reload_s
        rules = PageRules(spec.page_bytes, spec.policy, lambda ref: reload_s(ref.nbytes), self._is_used)
        self._placed = PlacedAdapters(memory.first_pages, rules, self._displaced)
        self._users: dict[str, int] = {}  # live requests
        self._requested: list[SimAdapter] = []  # absent, and what requests wait for: the most urgent first
        self._pulls: dict[str, tuple[str, ...]] = {}  # what the coordinator waits for, and the sources
        self._draining: dict[str, AdapterRef] = {}  # dropped, and still in use
        self._planning = False
        self.fetches = 0
        self.recalls = 0  # of the fetches, those from the host's memory

    @property
    def ready(self) -> Collection[str]:
        """Digests of what is here."""
        return self._placed.ready.keys()

    @property
    def is_fetching(self) -> bool:
        """True if bytes are on their way."""
        return self._placed.is_fetching

    @property
    def used_bytes(self) -> int:
        """Sum up the bytes of what is here or on its way."""
        return self._placed.used_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of the card that adapters have now, used or not."""
        return self._placed.num_pages * self._page_bytes

    @property
    def evictions(self) -> int:
        """Count the adapters that have lost their pages."""
        return self._placed.evictions

    @property
    def room_bytes(self) -> int:
        """Memory that is neither kept for the coordinator nor needed by requests, those that wait included."""
        asked = (self._placed.by_digest(digest).ref for digest in self._users)
        needed = sum(ref.nbytes for ref in asked if not self._agent.holds(ref))
        return max(0, self._memory_bytes - self._agent.used_bytes - needed)

    def cached(self) -> tuple[AdapterRef, ...]:
        """List what is here and may go at any time."""
        return tuple(ref for ref in self._placed.here() if not self._agent.has(ref))

    def can_give(self, digest: str) -> bool:
        """Tell whether a peer can copy an adapter from here, out of the card or the host's memory."""
        return digest in self._placed.ready or digest in self._host

    def retain(self, adapter: AdapterRef) -> bool:
        """Hold on to `adapter` for one request; False, and nothing done, if it has no room beside what is kept."""
        if adapter.is_base:
            return True
        if not self._can_ever_fit(adapter):
            return False
        self._users[adapter.digest] = self._users.get(adapter.digest, 0) + 1
        self._placed.known(adapter)
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
        self._requested = [each for each in self._placed.known_of(adapters) if each.run is None]
        self._advance()

    def hopeless(self) -> list[AdapterRef]:
        """List what requests wait for and what is kept has taken the room of for good."""
        asked = [self._placed.by_digest(digest) for digest in self._users]
        return [each.ref for each in asked if each.run is None and not self._can_ever_fit(each.ref)]

    def begin_step(self) -> Collection[str]:
        """Return the digests of what is here, which stays until `acquire`, or the next step if none runs."""
        idle, self._planning = self._planning, False
        self._placed.step += 1
        self._advance(Force.IDLE if idle else Force.NOT_RUNNING)
        self._planning = True
        return self.ready

    def make_way(self, adapter: AdapterRef | None, running: frozenset[str]) -> frozenset[str]:
        """Empty pages for one that has waited too long, or for none; return the digests that are to leave."""
        return self._placed.make_way(adapter, running)

    def acquire(self, adapters: Iterable[AdapterRef]) -> None:
        """Pin what the step runs; what waits may displace the rest from now on."""
        for each in self._placed.known_of(adapters):
            self._placed.lease(each)
        self._planning = False
        self._advance()

    def end_step(self, adapters: Iterable[AdapterRef]) -> None:
        """Undo one `acquire`."""
        for each in self._placed.known_of(adapters):
            each.leases -= 1
        self._advance()

    def would_go_on(self) -> bool:
        """Return whether another step, though it may run nothing, would find pages for what waits."""
        if self._requested:
            first = self._requested[0]
            force = Force.IDLE if first.ref.digest in self._users else Force.UNUSED
            return self._placed.could_reserve(first, force)
        absent = (self._placed.by_digest(digest) for digest in self._pulls)
        return any(self._placed.could_reserve(each, Force.UNUSED) for each in absent)

    # The coordinator

    def pull(self, adapter: AdapterRef, sources: tuple[str, ...]) -> None:
        """Get `adapter` on the coordinator's behalf."""
        each = self._placed.known(adapter)
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

    # The boundary to K/V

    def lacking_pages(self) -> int:
        """Return how many more pages at the end the first in line waits for, or else the coordinator."""
        if self._requested:
            first = self._requested[0]
            return self._placed.lacking_pages(first.ref) if first.ref.digest in self._users else 0
        absent = next(iter(self._pulls), None)
        return self._placed.lacking_pages(self._placed.by_digest(absent).ref) if absent is not None else 0

    def lacks_headroom(self) -> bool:
        """Tell whether the largest adapter here would not find its pages once more."""
        return self._placed.lacks_headroom()

    def could_cede(self, pages: int) -> bool:
        """Tell whether `cede` would do something."""
        return not self._planning and self._placed.can_clear_end(pages)

    def cede(self, pages: int) -> bool:
        """Give up the last `pages` pages, if nothing in use lies there."""
        if not self.could_cede(pages):
            return False
        self._placed.clear_end(pages)
        return True

    def extend(self, pages: int) -> None:
        """Take over the next `pages` pages."""
        self._placed.extend(pages)
        self._advance()

    def check(self) -> None:
        """Assert that all that is here or on its way lies apart, and within memory."""
        self._placed.check(self._agent.node)
        self._host.check(self._agent.node)

    def _can_ever_fit(self, adapter: AdapterRef) -> bool:
        if self._placed.pages_for(adapter) * self._page_bytes > self._memory_bytes:
            return False
        if adapter.digest in self._placed.ready or self._agent.holds(adapter):
            return True
        return self._agent.used_bytes + adapter.nbytes <= self._memory_bytes

    def _is_used(self, adapter: AdapterRef) -> bool:
        return adapter.digest in self._users or self._agent.has(adapter)

    def _free_dropped(self) -> None:
        """Tell the agent what was dropped and is not in use."""
        for digest, ref in list(self._draining.items()):
            if not self._agent.has(ref) or self._agent.keeps(ref):
                del self._draining[digest]
            elif digest not in self._users:
                del self._draining[digest]
                self._agent.freed(ref)

    def _advance(self, force: Force = Force.NOT_RUNNING) -> None:
        """Start what there is room for, what requests wait for first: only the first may displace others' adapters.

        Nobody waits for the coordinator's pulls, and small ones would take the room again and again.
        """
        if self._planning:
            force = Force.FREE_PAGES
        due: list[tuple[SimAdapter, tuple[str, ...]]] = []
        waiting, self._requested = [each for each in self._requested if each.run is None], []
        for each in waiting:
            urgent = each is waiting[0] and each.ref.digest in self._users
            sources = self._sources(each.ref)  # before others take its copy's place in the host's memory
            if self._placed.reserve(each, force if urgent else min(force, Force.UNUSED)):
                due.append((each, sources))
            else:
                self._requested.append(each)
        for digest, sources in list(self._pulls.items()):
            each = self._placed.by_digest(digest)
            if each.run is not None or not self._agent.holds(each.ref):
                del self._pulls[digest]
            elif not self._requested:
                sources = (self._agent.node,) if digest in self._host else sources
                if self._placed.reserve(each, min(force, Force.UNUSED)):
                    del self._pulls[digest]
                    due.append((each, sources))
        for each, sources in due:
            self._fetch(each, sources)

    def _sources(self, adapter: AdapterRef) -> tuple[str, ...]:
        if adapter.digest in self._host:
            return (self._agent.node,)
        return self._peers(adapter)

    def _peers(self, adapter: AdapterRef) -> tuple[str, ...]:
        """List the nodes that the table sends the adapter's requests to, which have it or soon will."""
        shares = self._agent.table.shares.get(adapter, ())
        return tuple(share.node for share in shares if share.node != self._agent.node)

    def _fetch(self, each: SimAdapter, sources: tuple[str, ...]) -> None:
        self.fetches += 1
        if sources == (self._agent.node,):
            self._host.put(each.ref)
            self.recalls += 1
        self._transfer(each.ref, sources, lambda: self._arrive(each))

    def _arrive(self, each: SimAdapter) -> None:
        self._placed.arrive(each)
        self._agent.arrived(each.ref)
        self._advance()
        self._changed()

    def _displaced(self, each: SimAdapter) -> None:
        """Keep a copy in the host's memory of what has left the card."""
        self._host.put(each.ref)
        self._agent.displaced(each.ref)
        if self._agent.holds(each.ref):
            self._pulls[each.ref.digest] = self._peers(each.ref)
