"""Which adapters lie on which pages of one simulated card, and who makes room for others.

Stands in for the live store's residency: pages lie as there and are given by the same policy. Why an adapter is
asked for, and from where its bytes come, is the store's business.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter, le

from lora.adapter import AdapterRef
from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, ResidencyPolicy, Usage
from lora.memory.clearance import Clearance
from lora.memory.page_allocator import PageAllocator

_UNUSED = Usage()
_START = attrgetter("start")


@dataclass(slots=True)
class SimAdapter:
    """One adapter: it has a `run` of pages while it is `here` or arriving, and `leases` while a step runs it."""

    ref: AdapterRef
    leases: int = 0
    run: PageRun | None = None
    here: bool = False
    usage: Usage = _UNUSED


@dataclass(frozen=True, slots=True)
class PageRules:
    """How large a page is, who makes room, what a reload is taken to cost, and who is in use."""

    page_bytes: int
    policy: ResidencyPolicy
    reload_s: Callable[[AdapterRef], float]
    is_used: Callable[[AdapterRef], bool]


class PlacedAdapters:
    """Owner of one card's pages. `displaced` is called with each adapter that has lost its pages.

    `step` counts the steps that have begun; the owner counts.
    """

    def __init__(self, num_pages: int, rules: PageRules, displaced: Callable[[SimAdapter], None]) -> None:
        self._pages = PageAllocator(num_pages)
        self._rules, self._displaced = rules, displaced
        self._clearance = Clearance(rules.policy)
        self._adapters: dict[str, SimAdapter] = {}  # all that were ever asked for, by digest
        self._placed: dict[str, SimAdapter] = {}  # those with pages
        self._ready: dict[str, None] = {}
        self.step = 0
        self.used_bytes = 0  # of what is here or on its way
        self.evictions = 0

    @property
    def ready(self) -> Mapping[str, None]:
        """Digests of what is here."""
        return self._ready

    @property
    def is_fetching(self) -> bool:
        """True if bytes are on their way."""
        return len(self._placed) > len(self._ready)

    @property
    def num_pages(self) -> int:
        """Pages that adapters have now."""
        return self._pages.num_pages

    def known(self, adapter: AdapterRef) -> SimAdapter:
        """Return the one record of an adapter."""
        return self._adapters.setdefault(adapter.digest, SimAdapter(adapter))

    def known_of(self, adapters: Iterable[AdapterRef]) -> list[SimAdapter]:
        """Return the records of these; the base model needs no pages."""
        return [self.known(ref) for ref in adapters if not ref.is_base]

    def by_digest(self, digest: str) -> SimAdapter:
        """Return the record of an adapter that is known."""
        return self._adapters[digest]

    def here(self) -> Iterable[AdapterRef]:
        """List what is here."""
        return (self._placed[digest].ref for digest in self._ready)

    def pages_for(self, adapter: AdapterRef) -> int:
        """Return how many pages an adapter takes."""
        return -(-adapter.nbytes // self._rules.page_bytes)

    def lease(self, each: SimAdapter) -> None:
        """Pin an adapter for a step."""
        each.leases += 1
        each.usage = self._rules.policy.ran(each.usage, self.step)

    def reserve(self, each: SimAdapter, force: Force) -> bool:
        """Give an absent adapter its pages, displacing others as far as `force` allows; False if it must wait."""
        count, kept = self.pages_for(each.ref), self._clearance.kept_from(each.ref.digest)
        run = self._pages.allocate(count, kept)
        if run is None and force > Force.FREE_PAGES:
            victims = self._victims(each, force, self.step)
            if victims is not None:
                self._displace_all(victims)
                run = self._pages.allocate(count, kept)
            elif each.ref.digest == self._clearance.digest:
                run = self._clear_window()
        if run is None:
            return False
        if each.ref.digest == self._clearance.digest:
            self._clearance.stop()
        each.run = run
        self._placed[each.ref.digest] = each
        self.used_bytes += each.ref.nbytes
        return True

    def make_way(self, adapter: AdapterRef | None, running: frozenset[str]) -> frozenset[str]:
        """Empty pages for an absent adapter that has waited too long, or for none; return what is to leave."""
        if adapter is None or self.known(adapter).run is not None:
            self._clearance.stop()
            return frozenset()
        request = PageRequest(self.pages_for(adapter), self.num_pages, Force.CLEAR, self.step)
        self._clearance.go_on(adapter.digest, running, request, self._occupants())
        return frozenset(
            digest for digest, each in self._placed.items() if self._clearance.is_inside(each.run)
        )

    def could_reserve(self, each: SimAdapter, force: Force) -> bool:
        """Return whether `reserve` would find pages in the next step, or empty some of them."""
        clears = each.ref.digest == self._clearance.digest and bool(self._clearable())
        return clears or self._victims(each, force, self.step + 1) is not None

    def arrive(self, each: SimAdapter) -> None:
        """Take in that the adapter's bytes are on its pages."""
        each.here = True
        each.usage = self._rules.policy.placed(each.usage, self.step)
        self._ready[each.ref.digest] = None

    def lacking_pages(self, adapter: AdapterRef) -> int:
        """Return how many more free pages at the end the adapter would need there."""
        return max(0, self.pages_for(adapter) - self._pages.free_at_end)

    def lacks_headroom(self) -> bool:
        """Tell whether the largest adapter that is placed would not find its pages once more."""
        free = self._pages.free_at_end
        return any(len(each.run) > free for each in self._placed.values() if each.run is not None)

    def can_clear_end(self, pages: int) -> bool:
        """Tell whether nothing in use lies in the last `pages` pages."""
        inside = self._clearance.is_inside(PageRun(self.num_pages - pages, self.num_pages))
        unused = all(self._claim(each) is Claim.UNUSED for each in self._at_end(pages))
        return pages <= self.num_pages and not inside and unused

    def clear_end(self, pages: int) -> None:
        """Give up the last `pages` pages, which `can_clear_end` allows."""
        self._displace_all(self._at_end(pages))
        self._pages.cede(pages)

    def extend(self, pages: int) -> None:
        """Take over the next `pages` pages."""
        self._pages.extend(pages)

    def check(self, name: str) -> None:
        """Assert that the pages of all that is here or on its way are apart, and are the adapters'."""
        # Runs are sorted by a key, and told apart in C: an audited run comes here after every event.
        runs = sorted((each.run for each in self._placed.values() if each.run is not None), key=_START)
        assert len(runs) == len(self._placed), f"{name} has adapters without pages"
        starts, ends = [run.start for run in runs], [0, *(run.stop for run in runs)]
        assert all(map(le, ends, starts)), f"{name} has two adapters in one page"
        assert ends[-1] <= self.num_pages, f"{name} has adapters beyond their pages"

    def _at_end(self, pages: int) -> list[SimAdapter]:
        end = PageRun(self.num_pages - pages, self.num_pages)
        return [each for each in self._placed.values() if each.run is not None and each.run.overlaps(end)]

    def _displace_all(self, adapters: Iterable[SimAdapter]) -> None:
        for each in adapters:
            self._displace(each)

    def _clear_window(self) -> PageRun | None:
        """Displace what runs no more on the pages that are being emptied; return them once all are free."""
        window = self._clearance.window
        if window is None:
            return None
        self._displace_all(self._clearable())
        return self._pages.take(window)

    def _clearable(self) -> list[SimAdapter]:
        idle = (each for each in self._placed.values() if self._claim(each) is not Claim.PINNED)
        return [each for each in idle if self._clearance.may_go(each.ref.digest, each.run)]

    def _displace(self, each: SimAdapter) -> None:
        assert each.run is not None, f"{each.ref.name} has no pages to give up"
        self._pages.free(each.run)
        each.run, each.here = None, False
        del self._placed[each.ref.digest], self._ready[each.ref.digest]
        self.used_bytes -= each.ref.nbytes
        self.evictions += 1
        self._displaced(each)

    def _victims(self, each: SimAdapter, force: Force, step: int) -> list[SimAdapter] | None:
        """Find whom to displace for `each`'s sake; None if it must wait."""
        request = PageRequest(self.pages_for(each.ref), self.num_pages, force, step)
        placed = {found.run: found for found in self._placed.values() if found.run is not None}
        occupants = self._clearance.without(each.ref.digest, self._occupants())
        chosen = self._rules.policy.displaced(request, occupants)
        return None if chosen is None else [placed[occupant.run] for occupant in chosen]

    def _occupants(self) -> list[Occupant]:
        reload_s = self._rules.reload_s
        return [
            Occupant(each.run, self._claim(each), each.usage, reload_s(each.ref))
            for each in self._placed.values()
            if each.run is not None
        ]

    def _claim(self, each: SimAdapter) -> Claim:
        if each.leases or not each.here:
            return Claim.PINNED
        return Claim.RETAINED if self._rules.is_used(each.ref) else Claim.UNUSED
