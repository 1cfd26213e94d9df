"""Hand out the one arena of memory that holds resident adapters, in pages.

A page is a fixed-size cut of an adapter's packed form, whatever its ranks and sites, so that nothing is padded to
a maximum rank. An adapter takes a contiguous run of pages, so that its matrices are plain views. No adapter is known
here.
"""

import torch
from torch import Tensor

from lora.format.packed import ALIGNMENT
from lora.memory.base import PageRun
from lora.memory.page_allocator import PageAllocator
from lora.memory.page_writer import DirectWriter, PageWriter


class RankPages:
    """Allocates runs of pages from one arena, best fit.

    Not thread-safe, its owner locks; but `writer`, `offset` and `rows` read nothing that changes.
    """

    def __init__(
        self,
        num_pages: int,
        page_bytes: int,
        device: torch.device | str = "cpu",
        writer: PageWriter | None = None,
        arena: Tensor | None = None,
    ) -> None:
        """Allocate the arena, or share the `arena` (bytes) that is given.

        `writer` says how an adapter lies in its pages: whole unless told otherwise. Pages of a shared arena are
        counted from its end, and others have what lies before the last one.
        """
        if num_pages < 1 or page_bytes < ALIGNMENT or page_bytes % ALIGNMENT:
            raise ValueError(
                f"num_pages={num_pages}, page_bytes={page_bytes}: give at least one page, and page_bytes a"
                f" positive multiple of {ALIGNMENT}"
            )
        self.page_bytes = page_bytes
        self.writer: PageWriter = writer or DirectWriter()
        self._shared = arena is not None
        self.arena = (
            torch.empty(num_pages * page_bytes, dtype=torch.uint8, device=device) if arena is None else arena
        )
        self._allocator = PageAllocator(num_pages)

    @property
    def num_pages(self) -> int:
        """Count the pages of the whole arena."""
        return self._allocator.num_pages

    @property
    def free_pages(self) -> int:
        """Count the pages that belong to nobody."""
        return self._allocator.free_pages

    @property
    def free_at_end(self) -> int:
        """Count the free pages after the last that is taken."""
        return self._allocator.free_at_end

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole arena."""
        return self.num_pages * self.page_bytes

    def pages_for(self, nbytes: int) -> int:
        """Return how many pages `nbytes` (above 0) take."""
        return -(-nbytes // self.page_bytes)

    def allocate(self, nbytes: int, kept: PageRun | None = None) -> PageRun | None:
        """Take the smallest free run outside `kept` that holds `nbytes`, cut to size; None if there is none."""
        return self._allocator.allocate(self.pages_for(nbytes), kept)

    def take(self, run: PageRun) -> PageRun | None:
        """Take these very pages; None if not all of them are free."""
        return self._allocator.take(run)

    def free(self, run: PageRun) -> None:
        """Give back a run that `allocate` gave."""
        self._allocator.free(run)

    def extend(self, pages: int) -> None:
        """Take over the arena's next `pages` pages."""
        self._allocator.extend(pages)

    def cede(self, pages: int) -> None:
        """Give up the last `pages` pages, which are free."""
        self._allocator.cede(pages)

    def offset(self, run: PageRun) -> int:
        """Return where the run begins in the arena, in bytes."""
        if self._shared:
            return self.arena.numel() - run.stop * self.page_bytes
        return run.start * self.page_bytes

    def rows(self, run: PageRun) -> Tensor:
        """View the run's bytes: [len(run) * page_bytes] uint8."""
        offset = self.offset(run)
        return self.arena[offset : offset + len(run) * self.page_bytes]
