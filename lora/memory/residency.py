"""Residency: which contents are known, which of them lie in the arena, and how they give way to others.

Plain bookkeeping without threads, files or clocks: time is counted in steps. Who makes room is decided by a
ResidencyPolicy; the store locks the bookkeeping and moves the bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lora.adapter import AdapterRef
from lora.format.packed import PackedLayout
from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, ResidencyPolicy, Usage
from lora.memory.clearance import Clearance
from lora.memory.pages import RankPages
from lora.segments import AdapterWeights

_UNUSED = Usage()
Recall = Callable[[str, PageRun], bool]
"""Asked with a digest before its pages are reused: False if others still read them."""


@dataclass(slots=True)
class Content:
    """One adapter's content: who uses it and where it lies, `nbytes` of the arena.

    `names` bind it, `retained` counts the live requests that use it, `leases` the steps that run it now. It has
    a `run` of pages while it is resident or arriving, and `weights` only when it is resident.
    """

    ref: AdapterRef
    layout: PackedLayout
    reload_s: float
    nbytes: int
    names: int = 0
    retained: int = 0
    leases: int = 0
    run: PageRun | None = None
    weights: AdapterWeights | None = None
    failure: Exception | None = None
    usage: Usage = _UNUSED

    @property
    def wanted(self) -> bool:
        """Whether anyone can still ask for it."""
        return self.names > 0 or self.retained > 0

    @property
    def arriving(self) -> bool:
        """Whether its pages are being filled."""
        return self.run is not None and self.weights is None

    @property
    def claim(self) -> Claim:
        """What holds it on its pages, if it has any."""
        if self.leases or self.arriving:
            return Claim.PINNED
        return Claim.RETAINED if self.retained else Claim.UNUSED


class Residency:
    """The known contents and their places. Not thread-safe.

    Without a recall of its own, pages that are given up are free at once; else they may go later, by `give_back`.
    """

    def __init__(self, pages: RankPages, policy: ResidencyPolicy) -> None:
        self.pages = pages
        self._policy = policy
        self._clearance = Clearance(policy)
        self._recall: Recall = lambda digest, run: True
        self._leaving: dict[PageRun, Claim] = {}  # nobody's content, but not free yet
        self._contents: dict[str, Content] = {}
        self._snapshot: frozenset[str] | None = frozenset()
        self.step = 0
        self.evictions = 0

    @property
    def contents(self) -> Iterable[Content]:
        """All known contents, in order of first appearance."""
        return self._contents.values()

    def known(self, digest: str) -> Content:
        """Return a content that must be known."""
        content = self.find(digest)
        assert content is not None, f"{digest} is not known: only what ready() names can run"
        return content

    def places(self, kept: frozenset[str]) -> tuple[dict[str, str], int]:
        """Return where each content is, by digest, and the bytes that others could have.

        A place is `device` for what is resident, else `elsewhere`. Pages that are free count as others', and those of
        contents that no request needs and that are not in `kept`.
        """
        found = {c.ref.digest: "elsewhere" if c.weights is None else "device" for c in self.contents}
        loose = [
            len(c.run)
            for c in self.contents
            if c.run is not None and not (c.retained or c.leases or c.ref.digest in kept)
        ]
        return found, (self.pages.free_pages + sum(loose)) * self.pages.page_bytes

    def census(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Count the known contents and the bytes of the arena that they take or would take, by place and rank."""
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for content in self.contents:
            key = "device" if content.weights is not None else "elsewhere", content.ref.rank
            count, nbytes = found.get(key, (0, 0))
            found[key] = count + 1, nbytes + content.nbytes
        return found

    def on_recall(self, recall: Recall) -> None:
        """Have `recall` asked before the pages of a resident content are reused."""
        self._recall = recall

    def find(self, digest: str) -> Content | None:
        """Return the content, if it is known."""
        return self._contents.get(digest)

    def admit(self, ref: AdapterRef, layout: PackedLayout, reload_s: float) -> Content:
        """Know this content; the one known already if there is one, its failure forgotten."""
        content = self._contents.get(ref.digest)
        if content is None:
            content = Content(ref, layout, reload_s, self.pages.writer.nbytes(layout))
            self._contents[ref.digest] = content
        content.failure = None
        return content

    def resident(self) -> frozenset[str]:
        """Return the digests of the resident contents."""
        if self._snapshot is None:
            found = self._contents.values()
            self._snapshot = frozenset(c.ref.digest for c in found if c.weights is not None)
        return self._snapshot

    def lease(self, content: Content) -> AdapterWeights:
        """Pin a resident content for a step."""
        assert content.weights is not None, f"{content.ref} is not resident: only what ready() names can run"
        content.usage = self._policy.ran(content.usage, self.step)
        content.leases += 1
        return content.weights

    def reserve(self, content: Content, force: Force) -> bool:
        """Give an absent content its pages, displacing others as far as `force` allows; False if it must wait."""
        kept = self._clearance.kept_from(content.ref.digest)
        run = self.pages.allocate(content.nbytes, kept)
        if run is None and force > Force.FREE_PAGES:
            victims = self._victims(content, force, self.step)
            if victims is not None:
                self._vacate_all(victims)
                run = self.pages.allocate(content.nbytes, kept)
                assert run is not None or self._leaving
            elif content.ref.digest == self._clearance.digest:
                run = self._clear_window()
        content.run = run
        if run is not None and content.ref.digest == self._clearance.digest:
            self._clearance.stop()
        return run is not None

    def make_way(self, content: Content | None, running: frozenset[str]) -> None:
        """Begin or go on to empty pages for an absent content that has waited too long; None: stop.

        Running sequences use the contents `running`, and others of those that are to go are admitted no more.
        """
        if content is None or content.run is not None or content.failure is not None:
            self._clearance.stop()
            return
        request = PageRequest(
            self.pages.pages_for(content.nbytes), self.pages.num_pages, Force.CLEAR, self.step
        )
        self._clearance.go_on(content.ref.digest, running, request, self._occupants())

    def to_leave(self) -> frozenset[str]:
        """Return the digests of the contents on the pages that are being emptied."""
        if self._clearance.window is None:
            return frozenset()
        return frozenset(c.ref.digest for c in self._contents.values() if self._clearance.is_inside(c.run))

    def could_reserve(self, content: Content, force: Force) -> bool:
        """Return whether `reserve` would do something in the next step, and not only wait for leaving pages."""
        victims = self._victims(content, force, self.step + 1)
        return victims is not None and (bool(victims) or not self._leaving)

    def can_clear_end(self, pages: int) -> bool:
        """Return whether no live request uses what lies in the arena's last `pages` pages."""
        end = self._end(pages)
        inside = (each.claim for each in self._occupants() if each.run.overlaps(end))
        free = end.start >= 0 and not self._clearance.is_inside(end)
        return free and all(claim is Claim.UNUSED for claim in inside)

    def clear_end(self, pages: int) -> bool:
        """Displace what lies in the arena's last `pages` pages, which `can_clear_end` allows.

        Returns whether they are free.
        """
        end = self._end(pages)
        self._vacate_all([c for c in self._contents.values() if c.run is not None and c.run.overlaps(end)])
        return self.pages.free_at_end >= pages

    def arrive(self, content: Content, weights: AdapterWeights) -> None:
        """Take in that the content's pages are filled."""
        content.weights = weights
        content.usage = self._policy.placed(content.usage, self.step)
        self._snapshot = None

    def abandon(self, content: Content, failure: Exception) -> None:
        """Take in that the content's pages could not be filled."""
        self._vacate(content)
        content.failure = failure

    def quarantine(self, content: Content) -> PageRun:
        """Make the content absent, and keep its pages from everybody until `give_back`. Returns them."""
        assert content.arriving
        run, content.run = content.run, None
        assert run is not None
        self._leaving[run] = Claim.PINNED
        return run

    def give_back(self, run: PageRun) -> None:
        """Free pages that were leaving."""
        del self._leaving[run]
        self.pages.free(run)

    def drop_unwanted(self, content: Content) -> bool:
        """Forget a content that nobody can ask for any more; False if it is still in use."""
        if content.wanted or content.claim is not Claim.UNUSED:
            return False
        self._vacate(content)
        del self._contents[content.ref.digest]
        return True

    def _end(self, pages: int) -> PageRun:
        return PageRun(self.pages.num_pages - pages, self.pages.num_pages)

    def _vacate(self, content: Content) -> None:
        run, resident = content.run, content.weights is not None
        content.run = content.weights = None
        if run is None:
            return
        if resident:
            self._snapshot = None
            if not self._recall(content.ref.digest, run):
                self._leaving[run] = Claim.LEAVING
                return
        self.pages.free(run)

    def _vacate_all(self, contents: list[Content]) -> None:
        for content in contents:
            self._vacate(content)
        self.evictions += len(contents)

    def _clear_window(self) -> PageRun | None:
        """Displace what runs no more on the pages that are being emptied; return them once all are free."""
        window = self._clearance.window
        if window is None:
            return None
        idle = (c for c in self._contents.values() if c.claim is not Claim.PINNED)
        self._vacate_all([c for c in idle if self._clearance.may_go(c.ref.digest, c.run)])
        return self.pages.take(window)

    def _victims(self, content: Content, force: Force, step: int) -> list[Content] | None:
        """Find whom to displace for `content`'s sake; None if it must wait."""
        needed = self.pages.pages_for(content.nbytes)
        request = PageRequest(needed, self.pages.num_pages, force, step)
        occupants = self._clearance.without(content.ref.digest, self._occupants())
        chosen = self._policy.displaced(request, occupants)
        if chosen is None:
            return None
        placed = {c.run: c for c in self._contents.values()}
        return [placed[each.run] for each in chosen]

    def _occupants(self) -> list[Occupant]:
        """List everything that is not free."""
        known = self._contents.values()
        placed = [Occupant(c.run, c.claim, c.usage, c.reload_s) for c in known if c.run is not None]
        return placed + [Occupant(run, claim) for run, claim in self._leaving.items()]
