"""Residency: which contents are known, which of them lie in the arena, and which make room for others.

Plain bookkeeping without threads, files or clocks (time is counted in steps), so that the rules can be tested
as such; the store locks it and moves the bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from lora.adapter import AdapterRef
from lora.format.packed import PackedLayout
from lora.memory.pages import PageRun, RankPages
from lora.segments import AdapterWeights

_POPULARITY_HALF_LIFE_STEPS = 1000
_PATIENCE_STEPS = 64  # how long what is wanted but does not run keeps its place against what waits


class Force(IntEnum):
    """How far a content may go to get its pages."""

    FREE_PAGES = 0  # take what is free
    UNUSED = 1  # displace what no live request uses
    NOT_RUNNING = 2  # displace also what live requests use but have not run for a while
    IDLE = 3  # nothing runs: displace whatever had its chance and is not leased


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
    uses: float = 0.0  # decayed count of the steps that ran it, as of `used_step`
    used_step: int = 0
    placed_step: int = 0

    @property
    def wanted(self) -> bool:
        """Whether anyone can still ask for it."""
        return self.names > 0 or self.retained > 0

    @property
    def arriving(self) -> bool:
        """Whether its pages are being filled."""
        return self.run is not None and self.weights is None

    def popularity(self, step: int) -> float:
        """Recent steps that ran it, each weighing half as much a half-life later."""
        return self.uses * 0.5 ** ((step - self.used_step) / _POPULARITY_HALF_LIFE_STEPS)


Loss = tuple[int, float]
_PINNED: Loss | None = None
_FREE_SOON: Loss = (0, 0.0)


class Residency:
    """The known contents and their places. Not thread-safe.

    `recall(digest, run)` is asked before a resident content's pages are reused: True if nobody outside reads them,
    else they go by `give_back`, later.
    """

    def __init__(
        self, pages: RankPages, recall: Callable[[str, PageRun], bool] = lambda digest, run: True
    ) -> None:
        self._pages = pages
        self._recall = recall
        self._leaving: dict[PageRun, Loss | None] = {}  # nobody's content, but not free yet
        self._contents: dict[str, Content] = {}
        self._snapshot: frozenset[str] | None = frozenset()
        self.step = 0
        self.evictions = 0

    @property
    def contents(self) -> Iterable[Content]:
        """All known contents, in order of first appearance."""
        return self._contents.values()

    def find(self, digest: str) -> Content | None:
        """The content, if it is known."""
        return self._contents.get(digest)

    def admit(self, ref: AdapterRef, layout: PackedLayout, reload_s: float) -> Content:
        """Know this content; the one known already if there is one, its failure forgotten."""
        content = self._contents.get(ref.digest)
        if content is None:
            content = Content(ref, layout, reload_s, self._pages.stowage.nbytes(layout))
            self._contents[ref.digest] = content
        content.failure = None
        return content

    def resident(self) -> frozenset[str]:
        """Digests of the resident contents."""
        if self._snapshot is None:
            found = self._contents.values()
            self._snapshot = frozenset(c.ref.digest for c in found if c.weights is not None)
        return self._snapshot

    def lease(self, content: Content) -> AdapterWeights:
        """Pin a resident content for a step."""
        assert content.weights is not None, f"{content.ref} is not resident: only what ready() names can run"
        content.uses = content.popularity(self.step) + 1.0
        content.used_step = self.step
        content.leases += 1
        return content.weights

    def reserve(self, content: Content, force: Force) -> bool:
        """Give an absent content its pages, displacing others as far as `force` allows. False if it must wait."""
        run = self._pages.allocate(content.nbytes)
        if run is None and force > Force.FREE_PAGES:
            victims = self._victims(content, force, self.step)
            if victims is None:
                return False
            for victim in victims:
                self._vacate(victim)
            self.evictions += len(victims)
            run = self._pages.allocate(content.nbytes)
            assert run is not None or self._leaving
        content.run = run
        return run is not None

    def can_clear_end(self, pages: int) -> bool:
        """Whether no live request uses what lies in the arena's last `pages` pages."""
        end = PageRun(self._pages.num_pages - pages, self._pages.num_pages)
        inside = [c for c in self._contents.values() if c.run is not None and c.run.overlaps(end)]
        used = any(c.leases or c.arriving or c.retained for c in inside)
        return end.start >= 0 and not used and not any(map(end.overlaps, self._leaving))

    def clear_end(self, pages: int) -> bool:
        """Displace what lies in the arena's last `pages` pages, which `can_clear_end` allows; whether they are free."""
        end = PageRun(self._pages.num_pages - pages, self._pages.num_pages)
        for content in [c for c in self._contents.values() if c.run is not None and c.run.overlaps(end)]:
            self._vacate(content)
            self.evictions += 1
        return self._pages.free_at_end >= pages

    def could_reserve(self, content: Content, force: Force) -> bool:
        """Whether `reserve` would do something in the next step, and not only wait for pages that are leaving."""
        victims = self._victims(content, force, self.step + 1)
        return victims is not None and (bool(victims) or not self._leaving)

    def arrive(self, content: Content, weights: AdapterWeights) -> None:
        """The content's pages are filled."""
        content.weights = weights
        content.placed_step = content.used_step = self.step
        self._snapshot = None

    def abandon(self, content: Content, failure: Exception) -> None:
        """The content's pages could not be filled."""
        self._vacate(content)
        content.failure = failure

    def quarantine(self, content: Content) -> PageRun:
        """The content's pages cannot be used by anybody until `give_back`: it is absent again. Its old pages."""
        assert content.arriving
        run, content.run = content.run, None
        assert run is not None
        self._leaving[run] = _PINNED
        return run

    def give_back(self, run: PageRun) -> None:
        """Pages that were leaving are free."""
        del self._leaving[run]
        self._pages.free(run)

    def drop_unwanted(self, content: Content) -> bool:
        """Forget a content that nobody can ask for any more, and free its pages; False if it is still in use."""
        if content.wanted or content.leases or content.arriving:
            return False
        self._vacate(content)
        del self._contents[content.ref.digest]
        return True

    def _vacate(self, content: Content) -> None:
        run, resident = content.run, content.weights is not None
        content.run = content.weights = None
        if run is None:
            return
        if resident:
            self._snapshot = None
            if not self._recall(content.ref.digest, run):
                self._leaving[run] = _FREE_SOON
                return
        self._pages.free(run)

    def _victims(self, content: Content, force: Force, step: int) -> list[Content] | None:
        """Whom to displace for `content`'s sake: the neighbours whose loss costs least; None if nobody may be."""
        placed = [(c.run, c) for c in self._contents.values() if c.run is not None]
        placed.sort(key=lambda found: found[0])
        occupants = [Occupant(run, self._loss(c, force, step)) for run, c in placed]
        occupants += [Occupant(run, loss) for run, loss in self._leaving.items()]
        needed = self._pages.pages_for(content.nbytes)
        window = cheapest_window(
            self._pages.num_pages, needed, sorted(occupants, key=lambda occupant: occupant.run)
        )
        if window is None:
            return None
        return [c for run, c in placed if run.overlaps(window)]

    def _loss(self, content: Content, force: Force, step: int) -> Loss | None:
        """What displacing a placed content costs: live requests first, then the reload it is likely to need."""
        if content.leases or content.arriving or (content.retained and not _outstayed(content, force, step)):
            return _PINNED
        return min(content.retained, 1), content.reload_s * (content.popularity(step) + 1e-3)


def _outstayed(content: Content, force: Force, step: int) -> bool:
    """Whether a content that live requests use has had its chance to run."""
    if force == Force.IDLE:
        return content.placed_step + 1 < step  # a plan has known it, and did not run it
    return force == Force.NOT_RUNNING and step - content.used_step >= _PATIENCE_STEPS


@dataclass(frozen=True, slots=True)
class Occupant:
    """Pages that are taken; `loss` is what emptying them costs, None where that is impossible."""

    run: PageRun
    loss: Loss | None


def cheapest_window(num_pages: int, needed: int, occupants: Sequence[Occupant]) -> PageRun | None:
    """The run of `needed` pages that costs least to empty; None if every such run holds something fixed.

    `occupants` are disjoint and ascending. Any window can slide left, losing nothing, until it meets the end of
    an occupant or of the arena, so only those starts are tried. Against evicting the contents that are cheapest
    per byte one by one, this takes no victim that leaves a hole too small to use.
    """
    best: tuple[Loss, PageRun] | None = None
    for start in (0, *(occupant.run.stop for occupant in occupants)):
        window = PageRun(start, start + needed)
        inside = [occupant.loss for occupant in occupants if occupant.run.overlaps(window)]
        if window.stop > num_pages or any(loss is None for loss in inside):
            continue
        losses = [loss for loss in inside if loss is not None]
        total = sum(loss[0] for loss in losses), sum(loss[1] for loss in losses)
        if best is None or total < best[0]:
            best = total, window
    return best[1] if best else None
