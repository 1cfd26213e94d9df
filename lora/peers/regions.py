"""Register pages with a transport, so that it may read and write them: a run of pages as a region, and back."""

import threading
from collections.abc import Callable

from torch import Tensor

from lora.memory.base import PageRun
from lora.memory.pages import RankPages
from transport.base import HOST, Memory, Region, Transport

_MANIFEST_PAGE_BYTES = 1024


class PageRegions:
    """An arena of pages, registered once with a transport."""

    def __init__(self, transport: Transport, pages: RankPages) -> None:
        self._pages = pages
        arena = pages.arena
        device = (arena.device.index or 0) if arena.is_cuda else HOST
        self._arena = transport.register(Memory(arena.data_ptr(), arena.numel(), device, arena))

    def region(self, run: PageRun, nbytes: int) -> Region:
        """Return the first `nbytes` of the run."""
        assert 0 < nbytes <= len(run) * self._pages.page_bytes, f"{nbytes} bytes in {run}"
        return self._arena.region(self._pages.offset(run), nbytes)

    def region_of(self, rows: Tensor, nbytes: int) -> Region:
        """Return the first `nbytes` of `rows`, a view into the arena."""
        assert 0 < nbytes <= rows.numel(), f"{nbytes} bytes in {rows.numel()}"
        return self._arena.region(rows.data_ptr() - self._arena.memory.address, nbytes)


class ManifestBuffers:
    """Memory for the manifests that are published and read: small pages on the host.

    Any thread may call every method. `_lock` guards the pages, and nothing is called under it.
    """

    def __init__(self, transport: Transport, nbytes: int) -> None:
        self._pages = RankPages(nbytes // _MANIFEST_PAGE_BYTES, _MANIFEST_PAGE_BYTES)
        self._regions = PageRegions(transport, self._pages)
        self._lock = threading.Lock()

    @property
    def free_pages(self) -> int:
        """Pages that hold no manifest."""
        with self._lock:
            return self._pages.free_pages

    def take(self, nbytes: int) -> tuple[Region, Callable[[], None]] | None:
        """Take memory for a manifest; return it and how to give it back, or None if there is none."""
        with self._lock:
            run = self._pages.allocate(nbytes)
        if run is None:
            return None
        return self._regions.region(run, nbytes), lambda: self._give_back(run)

    def _give_back(self, run: PageRun) -> None:
        with self._lock:
            self._pages.free(run)
