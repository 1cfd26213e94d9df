"""LocalAdapters: what a node has, as its lending sees it."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora.errors import AdapterLost
from lora.format.packed import PackedLayout
from lora.memory.base import PageRun
from lora.memory.pages import RankPages
from lora.peers.manifest import weights_name
from lora.peers.regions import PageRegions
from transport.base import Transport


class LocalAdapters(Protocol):
    """Any thread may ask."""

    def declares(self, name: str) -> bool:
        """Whether `name` has a folder here that was not read yet. Never waits."""
        ...

    def read(self, name: str) -> None:
        """Read the folder of a declared name, which tells lending what the name means. Waits; AdapterRefused."""
        ...

    def layout(self, digest: str) -> PackedLayout | None:
        """The layout of a content that this node knows. Never waits."""
        ...

    def fetch_here(self, digest: str, destination: Tensor) -> bool:
        """Fill `destination` from what is on this node: memory, disk or folder. Waits; AdapterLost; False: not here."""
        ...


_ROOM_PATIENCE_S = 3.0  # for peers that still read an older copy
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishStats:
    """Counts since the start: `copies` brought to host memory for peers, `crowded` that found no room there.

    `free_pages` of the copies' pages hold nothing.
    """

    copies: int = 0
    crowded: int = 0
    free_pages: int = 0


class PublishedWeights:
    """Resident contents and copies of others. Safe to use from any thread; only jobs of `executor` wait.

    `pages` is the arena of resident contents, `room` are the copies' pages, on the host.
    """

    def __init__(self, transport: Transport, pages: PageRegions, room: RankPages, executor: Executor) -> None:
        self._transport = transport
        self._pages = pages
        self._room = room
        self._copy_pages = PageRegions(transport, room)
        self._executor = executor
        self._lock = threading.RLock()  # re-entered where a future is done already
        self._resident: set[str] = set()
        self._copies: OrderedDict[str, PageRun] = OrderedDict()  # the oldest first
        self._coming: dict[str, Future[None]] = {}
        self._leaving: set[Future[None]] = set()  # copies that peers still read
        self._copied = 0
        self._crowded = 0

    @property
    def stats(self) -> PublishStats:
        """A snapshot."""
        with self._lock:
            return PublishStats(self._copied, self._crowded, self._room.free_pages)

    def lend(self, digest: str, layout: PackedLayout, run: PageRun) -> None:
        """The content lies in `run` and will not change: let peers have it."""
        with self._lock:
            self._drop_copy(digest)
            self._resident.add(digest)
            self._transport.memory.publish(weights_name(digest), [self._pages.region(run, layout.nbytes)])

    def recall(self, digest: str) -> Future[None]:
        """Lend a resident content's pages no more; done when no peer reads them."""
        with self._lock:
            self._resident.remove(digest)
            return self._transport.memory.withdraw(weights_name(digest))

    def forget(self, digest: str) -> None:
        """This node does not know the content any more."""
        with self._lock:
            self._coming.pop(digest, None)
            self._drop_copy(digest)

    def bring(self, digest: str, stock: LocalAdapters) -> Future[None] | None:
        """Lend a content from host memory, if it is on this node; done when that has come to its end."""
        if stock.layout(digest) is None:
            return None
        with self._lock:
            coming = self._coming.get(digest)
            if coming is not None:
                return coming
            coming = Future[None]()
            if digest in self._resident or digest in self._copies:
                coming.set_result(None)
                return coming
            self._coming[digest] = coming
        self._executor.submit(self._bring, digest, stock, coming)
        return coming

    def _bring(self, digest: str, stock: LocalAdapters, coming: Future[None]) -> None:
        """Runs on the executor."""
        try:
            self._copy(digest, stock, coming)
        except (AdapterLost, OSError) as error:
            _log.warning("adapter %s is not lent: %s", digest[:12], error)
        finally:
            with self._lock:
                if self._coming.get(digest) is coming:
                    del self._coming[digest]
            coming.set_result(None)

    def _copy(self, digest: str, stock: LocalAdapters, coming: Future[None]) -> None:
        layout = stock.layout(digest)
        run = self._make_room(layout.nbytes) if layout is not None else None
        if layout is None or run is None:
            return
        used = False
        try:
            if stock.fetch_here(digest, self._room.rows(run)):
                used = self._publish(digest, layout, run, coming)
        finally:
            if not used:
                with self._lock:
                    self._room.free(run)

    def _publish(self, digest: str, layout: PackedLayout, run: PageRun, coming: Future[None]) -> bool:
        """Lend the copy, unless the content has become resident or unknown meanwhile."""
        with self._lock:
            if self._coming.get(digest) is not coming or digest in self._resident or digest in self._copies:
                return False
            self._transport.memory.publish(
                weights_name(digest), [self._copy_pages.region(run, layout.nbytes)]
            )
            self._copies[digest] = run
            self._copied += 1
            return True

    def _make_room(self, nbytes: int) -> PageRun | None:
        """Pages for a copy; older ones go for it. None if they do not suffice, or are read for too long."""
        until_s = time.monotonic() + _ROOM_PATIENCE_S
        while True:
            with self._lock:
                run = self._room.allocate(nbytes)
                while run is None and self._copies:
                    self._drop_copy(next(iter(self._copies)))
                    run = self._room.allocate(nbytes)
                leaving = tuple(self._leaving)
            if run is not None:
                return run
            left_s = until_s - time.monotonic()
            if not leaving or left_s <= 0:
                break
            wait(leaving, left_s, FIRST_COMPLETED)
        with self._lock:
            self._crowded += 1
        _log.warning("no room to lend %d bytes: peers may have %d at a time", nbytes, self._room.nbytes)
        return None

    def _drop_copy(self, digest: str) -> None:
        """Lend the copy no more, if there is one; its pages go when no peer reads them. Under the lock."""
        run = self._copies.pop(digest, None)
        if run is None:
            return
        read = self._transport.memory.withdraw(weights_name(digest))
        self._leaving.add(read)
        read.add_done_callback(self._freeing(run))

    def _freeing(self, run: PageRun) -> Callable[[Future[None]], None]:
        def free(read: Future[None]) -> None:
            with self._lock:
                self._leaving.remove(read)
                self._room.free(run)

        return free
