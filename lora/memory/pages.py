"""RankPages: the one arena of memory that holds resident adapters, handed out in pages.

A page is a fixed-size cut of an adapter's flat form, whatever its ranks and sites, so that nothing is padded to
a maximum rank. An adapter takes a contiguous run of pages, so that its matrices are plain views. The room knows
no adapter; it is not thread-safe, its owner locks.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.format.packed import ALIGNMENT
from lora.memory.page_writer import DirectWriter, PageWriter


@dataclass(frozen=True, slots=True, order=True)
class PageRun:
    """Pages `start .. stop - 1` of the arena."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: "PageRun") -> bool:
        """Whether any page is in both."""
        return self.start < other.stop and other.start < self.stop


class RankPages:
    """Allocates runs of pages from one arena, best fit; neighbouring free runs are always one run."""

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        device: torch.device | str = "cpu",
        stowage: PageWriter | None = None,
        arena: Tensor | None = None,
    ) -> None:
        """`stowage` says how an adapter lies in its pages: whole unless told otherwise. An `arena` (bytes) that is
        given is shared: pages are counted from its end, and others have what lies before the last one."""
        if num_pages < 1 or page_bytes < ALIGNMENT or page_bytes % ALIGNMENT:
            raise ValueError(
                f"num_pages={num_pages}, page_bytes={page_bytes}: give at least one page, and page_bytes a"
                f" positive multiple of {ALIGNMENT}"
            )
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.stowage: PageWriter = stowage or DirectWriter()
        self._shared = arena is not None
        self.arena = (
            torch.empty(num_pages * page_bytes, dtype=torch.uint8, device=device) if arena is None else arena
        )
        self._free = [PageRun(0, num_pages)]  # ascending, disjoint, never adjacent

    @property
    def free_pages(self) -> int:
        """Pages that belong to nobody."""
        return sum(map(len, self._free))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena."""
        return self.num_pages * self.page_bytes

    def pages_for(self, nbytes: int) -> int:
        """Pages that `nbytes` (above 0) take."""
        return -(-nbytes // self.page_bytes)

    def allocate(self, nbytes: int) -> PageRun | None:
        """The smallest free run that holds `nbytes`, cut to size; None if there is none."""
        count = self.pages_for(nbytes)
        gaps = [gap for gap in self._free if len(gap) >= count]
        if not gaps:
            return None
        gap = min(gaps, key=len)
        run = PageRun(gap.start, gap.start + count)
        at = self._free.index(gap)
        self._free[at : at + 1] = [PageRun(run.stop, gap.stop)] if run.stop < gap.stop else []
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

    def extend(self, pages: int) -> None:
        """Take over the arena's next `pages` pages."""
        added = PageRun(self.num_pages, self.num_pages + pages)
        self.num_pages = added.stop
        self.free(added)

    def cede(self, pages: int) -> None:
        """Give up the last `pages` pages, which are free."""
        assert pages <= self.free_at_end, f"{pages} pages are not free at the end"
        last = self._free.pop()
        self.num_pages -= pages
        if last.start < self.num_pages:
            self._free.append(PageRun(last.start, self.num_pages))

    @property
    def free_at_end(self) -> int:
        """Free pages after the last that is taken."""
        last = self._free[-1] if self._free else PageRun(0, 0)
        return len(last) if last.stop == self.num_pages else 0

    def offset(self, run: PageRun) -> int:
        """Where the run begins in the arena, in bytes."""
        if self._shared:
            return self.arena.numel() - run.stop * self.page_bytes
        return run.start * self.page_bytes

    def rows(self, run: PageRun) -> Tensor:
        """The run's bytes: [len(run) * page_bytes] uint8, a view."""
        offset = self.offset(run)
        return self.arena[offset : offset + len(run) * self.page_bytes]
