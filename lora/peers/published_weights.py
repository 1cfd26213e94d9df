"""Publish the weights that peers may pull: of resident contents, and copies of others that are on this node.

A resident content is published from the pages that the steps read. Another, which lies in host memory, on disk or in
its folder, is copied to host memory when a peer asks for it. The copies have pages of their own, so that peers
displace nothing that this node runs: that is their bound. Whoever asks for the same content shares its copy. The
oldest copies make room for new ones, each once no peer reads it.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass

from torch import Tensor

from lora.daemon_threads import CallHangs
from lora.errors import AdapterLost
from lora.format.packed import PackedLayout
from lora.memory.base import PageRun
from lora.memory.pages import RankPages
from lora.peers.manifest import weights_name
from lora.peers.peer_stats import PublishStats
from lora.peers.regions import PageRegions
from transport.base import Transport

_ROOM_PATIENCE_S = 3.0  # for peers that still read an older copy
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalAdapters:
    """What a node has, as its publisher asks for it, from any thread.

    `declares(name)` tells whether a name has a folder here that was not read yet; `read(name)` reads that, waits, and
    raises AdapterRefused. `layout(digest)` is that of a content that this node knows. `fetch(digest, destination)`
    copies one from this node's memory, disk or folder, and waits: False if it is not here, AdapterLost if it should be.
    """

    declares: Callable[[str], bool]
    read: Callable[[str], None]
    layout: Callable[[str], PackedLayout | None]
    fetch: Callable[[str, Tensor], bool]


class PublishedWeights:
    """Resident contents, and copies of others. Any thread may call every method; only jobs of `executor` wait.

    `_lock` guards the copies' pages and what is published. Under it the transport is called; a transport that calls
    back at once finds it reentrant. Nothing of the store is called under it.
    """

    def __init__(
        self, transport: Transport, pages: PageRegions, copies: RankPages, executor: Executor
    ) -> None:
        """Publish nothing yet. `pages` is the arena of resident contents; `copies` are the copies' pages."""
        self._transport = transport
        self._pages = pages
        self._copy_pages = copies
        self._copy_regions = PageRegions(transport, copies)
        self._executor = executor
        self._lock = threading.RLock()
        self._resident: set[str] = set()
        self._copies: OrderedDict[str, PageRun] = OrderedDict()  # the oldest first
        self._copying: dict[str, Future[None]] = {}
        self._withdrawn: set[Future[None]] = set()  # copies that peers still read
        self._copied = 0
        self._crowded = 0

    @property
    def stats(self) -> PublishStats:
        """A snapshot."""
        with self._lock:
            return PublishStats(self._copied, self._crowded, self._copy_pages.free_pages)

    def publish(self, digest: str, layout: PackedLayout, run: PageRun) -> None:
        """Let peers have a content that is resident in `run` and will not change."""
        with self._lock:
            self._drop_copy(digest)
            self._resident.add(digest)
            self._transport.memory.publish(weights_name(digest), [self._pages.region(run, layout.nbytes)])

    def withdraw(self, digest: str) -> Future[None]:
        """Let no peer begin to read a resident content's pages any more; done when none reads them."""
        with self._lock:
            self._resident.remove(digest)
            return self._transport.memory.withdraw(weights_name(digest))

    def forget(self, digest: str) -> None:
        """Withdraw a content that this node does not know any more."""
        with self._lock:
            self._copying.pop(digest, None)
            self._drop_copy(digest)

    def publish_copy(self, digest: str, local: LocalAdapters) -> Future[None] | None:
        """Publish a content from host memory, if it is on this node; done when that has come to its end."""
        if local.layout(digest) is None:
            return None
        with self._lock:
            copying = self._copying.get(digest)
            if copying is not None:
                return copying
            copying = Future[None]()
            if digest in self._resident or digest in self._copies:
                copying.set_result(None)
                return copying
            self._copying[digest] = copying
        self._executor.submit(self._run, digest, local, copying)
        return copying

    def _run(self, digest: str, local: LocalAdapters, copying: Future[None]) -> None:
        """Copy, and end `copying` however that ends. Runs on the executor."""
        try:
            self._copy(digest, local, copying)
        except (AdapterLost, CallHangs, OSError) as error:
            _log.warning("adapter %s is not published: %s", digest[:12], error)
        finally:
            with self._lock:
                if self._copying.get(digest) is copying:
                    del self._copying[digest]
            copying.set_result(None)

    def _copy(self, digest: str, local: LocalAdapters, copying: Future[None]) -> None:
        layout = local.layout(digest)
        run = self._make_room(layout.nbytes) if layout is not None else None
        if layout is None or run is None:
            return
        used = False
        try:
            if local.fetch(digest, self._copy_pages.rows(run)):
                used = self._publish_run(digest, layout, run, copying)
        finally:
            if not used:
                with self._lock:
                    self._copy_pages.free(run)

    def _publish_run(self, digest: str, layout: PackedLayout, run: PageRun, copying: Future[None]) -> bool:
        """Publish the copy, unless the content has become resident or unknown meanwhile."""
        with self._lock:
            if self._copying.get(digest) is not copying or digest in self._resident or digest in self._copies:
                return False
            self._transport.memory.publish(
                weights_name(digest), [self._copy_regions.region(run, layout.nbytes)]
            )
            self._copies[digest] = run
            self._copied += 1
            return True

    def _make_room(self, nbytes: int) -> PageRun | None:
        """Free pages for a copy; older ones go for it. None if they do not suffice, or are read for too long."""
        until_s = time.monotonic() + _ROOM_PATIENCE_S
        while True:
            with self._lock:
                run = self._copy_pages.allocate(nbytes)
                while run is None and self._copies:
                    self._drop_copy(next(iter(self._copies)))
                    run = self._copy_pages.allocate(nbytes)
                withdrawn = tuple(self._withdrawn)
            if run is not None:
                return run
            left_s = until_s - time.monotonic()
            if not withdrawn or left_s <= 0:
                break
            wait(withdrawn, left_s, FIRST_COMPLETED)
        with self._lock:
            self._crowded += 1
        _log.warning(
            "no room to publish %d bytes: peers may have %d at a time", nbytes, self._copy_pages.nbytes
        )
        return None

    def _drop_copy(self, digest: str) -> None:
        """Withdraw the copy, if there is one; its pages are freed once no peer reads them. Under the lock."""
        run = self._copies.pop(digest, None)
        if run is None:
            return
        read = self._transport.memory.withdraw(weights_name(digest))
        self._withdrawn.add(read)
        read.add_done_callback(self._freeing(run))

    def _freeing(self, run: PageRun) -> Callable[[Future[None]], None]:
        def free(read: Future[None]) -> None:
            with self._lock:
                self._withdrawn.remove(read)
                self._copy_pages.free(run)

        return free
