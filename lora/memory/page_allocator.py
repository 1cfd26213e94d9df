"""Hand out runs of an arena's pages by best fit.

It counts pages, and knows neither their size nor what is in them. Not thread-safe: its owner locks.
"""

from bisect import bisect_left, bisect_right

from lora.memory.base import PageRun


class PageAllocator:
    """Owner of the free runs of `num_pages` pages; neighbouring free runs are always one run."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = [PageRun(0, num_pages)] if num_pages else []  # ascending, disjoint, never adjacent

    @property
    def free_pages(self) -> int:
        """Count the pages that belong to nobody."""
        return sum(map(len, self._free))

    @property
    def free_at_end(self) -> int:
        """Count the free pages after the last that is taken."""
        last = self._free[-1] if self._free else PageRun(0, 0)
        return len(last) if last.stop == self.num_pages else 0

    def allocate(self, count: int, kept: PageRun | None = None) -> PageRun | None:
        """Take the smallest free run that holds `count` pages, cut to size; None if there is none.

        None of the pages `kept` is taken.
        """
        gaps = [part for gap in self._free for part in gap.without(kept) if len(part) >= count]
        if not gaps:
            return None
        start = min(gaps, key=len).start
        return self.take(PageRun(start, start + count))

    def take(self, run: PageRun) -> PageRun | None:
        """Take these very pages; None if not all of them are free."""
        at = bisect_right(self._free, run.start, key=lambda gap: gap.start) - 1
        if at < 0 or self._free[at].stop < run.stop:
            return None
        self._free[at : at + 1] = self._free[at].without(run)
        return run

    def free(self, run: PageRun) -> None:
        """Give back a run that `allocate` gave."""
        at = bisect_left(self._free, run)
        first, last, start, stop = at, at, run.start, run.stop
        if at and self._free[at - 1].stop >= start:
            first, start = at - 1, self._free[at - 1].start
        if at < len(self._free) and self._free[at].start <= stop:
            last, stop = at + 1, self._free[at].stop
        merged = PageRun(start, stop)
        assert len(merged) == len(run) + sum(map(len, self._free[first:last])), f"{run} was free already"
        self._free[first:last] = [merged]

    def extend(self, count: int) -> None:
        """Own `count` pages more at the end, which are free."""
        added = PageRun(self.num_pages, self.num_pages + count)
        self.num_pages = added.stop
        self.free(added)

    def cede(self, count: int) -> None:
        """Own the last `count` pages no more; they are free."""
        assert count <= self.free_at_end, f"{count} pages are not free at the end"
        last = self._free.pop()
        self.num_pages -= count
        if last.start < self.num_pages:
            self._free.append(PageRun(last.start, self.num_pages))
