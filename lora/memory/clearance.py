"""Clearance: which pages are emptied for an adapter that has waited too long.

One window of neighbouring pages is chosen once, the cheapest of all, whatever runs there. Nobody else gets pages in
it, and what lies there goes as soon as nothing runs on it. So the adapter's wait has an end, and only sequences of
the adapters that are to go wait meanwhile. It knows pages and digests; its owner moves what lies on them.
"""

from collections.abc import Iterable, Sequence

from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, ResidencyPolicy


class Clearance:
    """Owner of the window that is being emptied, if there is one, and of whom it is for."""

    def __init__(self, policy: ResidencyPolicy) -> None:
        self._policy = policy
        self._running: frozenset[str] = frozenset()
        self.digest: str | None = None
        self.window: PageRun | None = None

    def go_on(
        self, digest: str, running: frozenset[str], request: PageRequest, occupants: Sequence[Occupant]
    ) -> None:
        """Choose a window for an adapter, unless it has one that still exists; `running` go on running."""
        self._running = running
        if self.digest != digest or self.window is None or self.window.stop > request.num_pages:
            self.digest, self.window = digest, self._choose(request, occupants)

    def stop(self) -> None:
        """Empty no window any more."""
        self.digest = self.window = None

    def kept_from(self, digest: str) -> PageRun | None:
        """Return the pages that an adapter may not have."""
        return None if digest == self.digest else self.window

    def is_inside(self, run: PageRun | None) -> bool:
        """Return whether any of these pages is to be emptied."""
        return run is not None and self.window is not None and run.overlaps(self.window)

    def may_go(self, digest: str, run: PageRun | None) -> bool:
        """Return whether an adapter that no step has leased must leave its pages now."""
        return self.is_inside(run) and digest not in self._running

    def without(self, digest: str, occupants: Iterable[Occupant]) -> list[Occupant]:
        """Return the occupants as another adapter must see them: the window is taken as a whole, and for good."""
        window = self.kept_from(digest)
        if window is None:
            return list(occupants)
        seen: list[Occupant] = []
        start, stop = window.start, window.stop
        for each in occupants:
            if each.run.overlaps(window):
                start, stop = min(start, each.run.start), max(stop, each.run.stop)
            else:
                seen.append(each)
        return [*seen, Occupant(PageRun(start, stop), Claim.PINNED)]

    def _choose(self, request: PageRequest, occupants: Sequence[Occupant]) -> PageRun | None:
        """Find a window in which only those lie that the policy would see go."""
        asked = PageRequest(request.pages, request.num_pages, Force.CLEAR, request.step)
        going = self._policy.displaced(asked, occupants)
        if going is None:
            return None
        stay = [each.run for each in occupants if each not in going and each.claim is not Claim.LEAVING]
        for start in (0, *sorted(each.run.stop for each in occupants)):
            window = PageRun(start, start + request.pages)
            if window.stop <= request.num_pages and not any(run.overlaps(window) for run in stay):
                return window
        return None
