"""Pages that a transport may read from and write to: a run of pages as a region, and back."""

import threading
from collections.abc import Callable

from torch import Tensor

from lora.memory.base import PageRun
from lora.memory.pages import RankPages
from transport.base import HOST, Memory, Region, Transport

_NOTE_PAGE_BYTES = 1024


class PageRegions:
    """An arena of pages, registered once with a transport."""

    def __init__(self, transport: Transport, pages: RankPages) -> None:
        self._pages = pages
        arena = pages.arena
        device = (arena.device.index or 0) if arena.is_cuda else HOST
        self._arena = transport.register(Memory(arena.data_ptr(), arena.numel(), device, arena))

    def region(self, run: PageRun, nbytes: int) -> Region:
        """The first `nbytes` of the run."""
        assert 0 < nbytes <= len(run) * self._pages.page_bytes, f"{nbytes} bytes in {run}"
        return self._arena.region(self._pages.offset(run), nbytes)

    def region_of(self, rows: Tensor, nbytes: int) -> Region:
        """The first `nbytes` of `rows`, a view into the arena."""
        assert 0 < nbytes <= rows.numel(), f"{nbytes} bytes in {rows.numel()}"
        return self._arena.region(rows.data_ptr() - self._arena.memory.address, nbytes)


class ManifestBuffers:
    """Memory for the notes that are lent and read: small pages on the host. Safe to use from any thread."""

    def __init__(self, transport: Transport, nbytes: int) -> None:
        self._pages = RankPages(nbytes // _NOTE_PAGE_BYTES, _NOTE_PAGE_BYTES)
        self._shared = PageRegions(transport, self._pages)
        self._lock = threading.Lock()

    @property
    def free_pages(self) -> int:
        """Pages that hold no note."""
        with self._lock:
            return self._pages.free_pages

    def take(self, nbytes: int) -> tuple[Region, Callable[[], None]] | None:
        """A place for a note, and how to give it back; None if there is none."""
        with self._lock:
            run = self._pages.allocate(nbytes)
        if run is None:
            return None
        return self._shared.region(run, nbytes), lambda: self._give(run)

    def _give(self, run: PageRun) -> None:
        with self._lock:
            self._pages.free(run)
