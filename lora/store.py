"""AdapterStore: the sole owner of adapters' names, contents and residency.

Front threads load, resolve and retain; the step thread asks what is ready and leases it; workers copy. Whatever
`ready()` has named stays resident until the next `acquire` or `ready()`, so that a plan made from it can always
run: nothing is evicted in between.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lora.adapter import AdapterRef
from lora.errors import AdapterRefused, BytesMayLand, UnknownAdapter
from lora.flat import FlatLayout, view
from lora.lease import Lease
from lora.names import AdapterEntry, Name
from lora.peer import Peering, PeerStats
from lora.peft import PackedAdapter
from lora.peft_config import CONFIG_FILE
from lora.pool import PageRun, RankPages
from lora.residency import Content, Force, Residency
from lora.segments import AdapterWeights
from lora.sites import BaseShape
from lora.supply import Supply
from lora.tiers import DiskTier, HostTier

__all__ = ["AdapterEntry", "AdapterStore", "Lease", "StoreStats", "UnknownAdapter"]

_log = logging.getLogger(__name__)
_HOST_BYTES = 256 << 20  # packed forms kept in host memory where there is no disk tier


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the start, and how full the arena is.

    `hits` counts where an adapter was found, by tier, `fallbacks` how often a tier was asked in vain.
    """

    resident: int
    resident_bytes: int
    total_pages: int
    free_pages: int
    loads: int
    load_s: float
    evictions: int
    hits: Mapping[str, int]
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    peers: PeerStats = field(default_factory=PeerStats)


class AdapterStore:
    """Names and contents of adapters, and the copies between tiers. Every method may be called from any thread;
    `ready`, `acquire` and Lease.release are the step thread's."""

    def __init__(
        self,
        base: BaseShape,
        dtype: torch.dtype,
        pages: RankPages,
        disk: DiskTier | None,
        workers: int | Executor = 1,
        peering: Peering | None = None,
    ) -> None:
        """`workers` is how many threads copy, or the executor to copy with; `peering` shares `pages`' arena."""
        self._pages = pages
        self._lending = peering.lending if peering else None
        self._supply = Supply(base, dtype, disk or HostTier(_HOST_BYTES), peering.tier if peering else None)
        self._executor = (
            workers if isinstance(workers, Executor) else ThreadPoolExecutor(workers, "adapter-copy")
        )
        self._lock = threading.Lock()  # guards all that follows
        self._residency = Residency(pages, self._recall)
        self._names: dict[str, Name] = {}
        self._wishes: list[Content] = []  # absent and asked for, the most urgent first
        self._doomed: dict[str, Content] = {}  # unwanted, to be dropped as soon as no plan can name them
        self._planning = False  # between ready() and acquire: nothing resident may go
        self._closed = False
        self._callbacks: tuple[Callable[[], None], ...] = ()
        self._recalled: list[tuple[PageRun, Future[None]]] = []  # pages that peers still read
        self._hits = 0
        self._loads = 0
        self._load_s = 0.0

    # Names

    def declare(self, name: str, folder: Path) -> None:
        """Remember a name and its PEFT folder; the weights are read when first asked for. Raises AdapterRefused."""
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterRefused(name, f"{folder} has no {CONFIG_FILE}: give a folder saved by PEFT")
        with self._lock:
            self._unbind(self._names.get(name))
            self._names[name] = Name(name, folder)
        self._settle()

    def load(self, name: str, folder: Path) -> AdapterRef:
        """Read, check and keep an adapter, then let `name` mean it; what the name meant before stays until unused.

        Resident on return if there are free pages. Raises AdapterRefused, and then nothing has changed.
        """
        packed = self._supply.pack(name, folder, self._pages.nbytes)
        self._bind(Name(name, folder), packed, replaces=None)
        return packed.ref

    def known(self, name: str) -> AdapterRef | None:
        """What `name` means, if that can be told without waiting."""
        with self._lock:
            entry = self._names.get(name)
            return entry.ref if entry else None

    def resolve(self, name: str) -> AdapterRef:
        """What `name` means; a declared adapter is read first, and peers are asked for one that is not known.

        Raises UnknownAdapter, AdapterRefused; AdapterUnreachable if not all peers could be asked.
        """
        while True:
            with self._lock:
                entry = self._names.get(name)
                if entry is not None and entry.ref is not None:
                    return entry.ref
            if entry is None or entry.folder is None:
                self._discover(name)
                continue
            with entry.packing:
                if entry.ref is None:
                    packed = self._supply.pack(name, entry.folder, self._pages.nbytes)
                    self._bind(entry, packed, replaces=entry)

    def unload(self, name: str) -> None:
        """Forget a name at once; its content goes when no live request uses it. Raises UnknownAdapter."""
        with self._lock:
            if name not in self._names:
                raise UnknownAdapter(name)
            self._unbind(self._names.pop(name))
        self._settle()

    def names(self) -> tuple[str, ...]:
        """All names, in order of registration."""
        with self._lock:
            return tuple(self._names)

    def entries(self) -> tuple[AdapterEntry, ...]:
        """All names with what they mean."""
        with self._lock:
            return tuple(AdapterEntry(name, entry.folder, entry.ref) for name, entry in self._names.items())

    # Live requests

    def retain(self, ref: AdapterRef) -> None:
        """A live request uses this content: it stays to be had until released. Raises UnknownAdapter if it is gone."""
        if ref.is_base:
            return
        with self._lock:
            content = self._residency.find(ref.digest)
            if content is None or not content.wanted:
                raise UnknownAdapter(ref.name)
            content.retained += 1

    def release(self, ref: AdapterRef) -> None:
        """Undo one `retain`."""
        if ref.is_base:
            return
        with self._lock:
            content = self._residency.find(ref.digest)
            assert content is not None, f"{ref} was not retained"
            assert content.retained > 0, f"{ref} was released more often than retained"
            content.retained -= 1
            self._doom_unwanted(content)
        self._settle()

    def prefetch(self, refs: Iterable[AdapterRef]) -> None:
        """Ask for these contents, the most urgent first, in place of what was asked for before. Never waits."""
        with self._lock:
            found = map(self._residency.find, dict.fromkeys(ref.digest for ref in refs))
            self._wishes = [c for c in found if c is not None and c.run is None and c.failure is None]
        self._settle()

    def failed(self) -> Mapping[str, Exception]:
        """Why retained contents cannot be had, by digest; gone once their requests have released them."""
        with self._lock:
            contents = self._residency.contents
            return {c.ref.digest: c.failure for c in contents if c.failure is not None and c.retained}

    # Steps

    def ready(self) -> frozenset[str]:
        """Digests of the resident contents; begins a step."""
        with self._lock:
            # The last plan was empty: nothing is running that an eviction could stall.
            idle, self._planning = self._planning, False
            self._residency.step += 1
        self._settle(Force.IDLE if idle else Force.NOT_RUNNING)
        with self._lock:
            self._planning = True
            return self._residency.resident()

    def acquire(self, refs: Iterable[AdapterRef]) -> Lease:
        """Pin adapters that the last `ready()` named; never waits."""
        with self._lock:
            pinned = [self._pinnable(ref) for ref in refs if not ref.is_base]
            weights = {content.ref.digest: self._residency.lease(content) for content in pinned}
            self._hits += len(pinned)
            self._planning = False
        self._settle()
        return Lease(weights, lambda: self._unpin(pinned))

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, from any thread and with no lock held, when a step may find more to run or to
        fail than the last one did."""
        with self._lock:
            self._callbacks += (callback,)

    def stats(self) -> StoreStats:
        """A snapshot."""
        with self._lock:
            resident = [c for c in self._residency.contents if c.weights is not None]
            return StoreStats(
                resident=len(resident),
                resident_bytes=sum(c.layout.nbytes for c in resident),
                total_pages=self._pages.num_pages,
                free_pages=self._pages.free_pages,
                loads=self._loads,
                load_s=self._load_s,
                evictions=self._residency.evictions,
                hits={"device": self._hits, **self._supply.hits},
                fallbacks=self._supply.fallbacks,
                peers=self._supply.peer_stats,
            )

    def close(self) -> None:
        """Finish the copies under way and start no more."""
        with self._lock:
            self._closed = True
            self._wishes = []
        self._executor.shutdown(wait=True)

    # Binding names to contents

    def _bind(self, entry: Name, packed: PackedAdapter, replaces: Name | None) -> None:
        """Let the entry's name mean the packed content, unless it has come to mean something else than `replaces`."""
        started_s = time.perf_counter()
        with self._lock:
            current = self._names.get(entry.name)
            if replaces is not None and current is not replaces:
                return
            content = self._mean(entry, packed.ref, packed.layout)
            placed = content.run is None and self._residency.reserve(content, Force.FREE_PAGES)
            keep = self._retained()
        if placed:
            self._fill(content, packed, started_s)
        self._supply.trim(keep | {packed.ref.digest})
        self._settle()

    def _discover(self, name: str) -> None:
        """Let `name` mean what a peer says that it means, unless it has come to mean something meanwhile."""
        note = self._supply.look_up(name, self._pages.nbytes)
        if note is None:
            raise UnknownAdapter(name)
        with self._lock:
            if name not in self._names:
                self._mean(Name(name, None), note.ref, note.layout)

    def _mean(self, entry: Name, ref: AdapterRef, layout: FlatLayout) -> Content:
        """Let the entry's name mean this content. Under the lock."""
        content = self._residency.admit(ref, layout, self._supply.reload_s(ref.nbytes))
        content.names += 1
        self._unbind(self._names.get(entry.name))
        entry.ref = ref
        self._names[entry.name] = entry
        self._supply.remember(ref.digest, layout, entry.name, entry.folder)
        if self._lending is not None:
            self._lending.bind(entry.name, ref.digest)
        return content

    def _retained(self) -> set[str]:
        """Digests whose packed forms must be kept. Under the lock."""
        return {c.ref.digest for c in self._residency.contents if c.retained}

    def _fill(self, content: Content, packed: PackedAdapter, started_s: float) -> None:
        """Bring a content in from the form just packed."""
        assert content.run is not None
        rows = self._pages.rows(content.run)
        rows[: packed.rows.numel()].copy_(packed.rows)
        self._arrive(content, view(rows, packed.layout, packed.ref.digest), time.perf_counter() - started_s)

    def _unbind(self, entry: Name | None) -> None:
        """One name fewer for the content it meant. Under the lock."""
        if entry is None or entry.ref is None:
            return
        content = self._residency.find(entry.ref.digest)
        entry.ref = None
        if self._lending is not None:
            self._lending.unbind(entry.name)
        if content is not None:
            content.names -= 1
            self._doom_unwanted(content)

    def _doom_unwanted(self, content: Content) -> None:
        if not content.wanted:
            self._doomed[content.ref.digest] = content

    # Leases

    def _pinnable(self, ref: AdapterRef) -> Content:
        content = self._residency.find(ref.digest)
        assert content is not None, f"{ref} is not known: only what ready() names can run"
        return content

    def _unpin(self, contents: Iterable[Content]) -> None:
        with self._lock:
            for content in contents:
                content.leases -= 1
        self._settle()

    # Moving bytes

    def _settle(self, force: Force = Force.NOT_RUNNING) -> None:
        """Drop what nobody wants, give wishes their pages, and start the copies."""
        if not self._wishes and not self._doomed:
            return
        with self._lock:
            if self._planning:
                force = Force.FREE_PAGES
            else:
                self._drop_doomed()
            granted = self._grant(force)
            stuck = self._planning and (bool(self._doomed) or self._could_grant())
            recalled, self._recalled = self._recalled, []
        for run, read in recalled:
            read.add_done_callback(partial(self._give_back, run))
        for content in granted:
            self._executor.submit(self._copy, content)
        if stuck:  # an idle loop must begin a step for anything to go
            self._notify()

    def _drop_doomed(self) -> None:
        for digest, content in tuple(self._doomed.items()):
            if content.wanted or self._residency.drop_unwanted(content):
                del self._doomed[digest]
                if not content.wanted:
                    self._supply.forget(digest)

    def _grant(self, force: Force) -> list[Content]:
        """Reserve pages for wishes: only the first may displace what live requests use."""
        waiting = [c for c in self._wishes if c.wanted and c.run is None and c.failure is None]
        self._wishes = []
        granted: list[Content] = []
        for content in () if self._closed else waiting:
            urgent = content is waiting[0] and content.retained > 0
            if self._residency.reserve(content, force if urgent else min(force, Force.UNUSED)):
                granted.append(content)
            else:
                self._wishes.append(content)
        return granted

    def _could_grant(self) -> bool:
        """Whether the next step would find room for the most urgent wish."""
        if not self._wishes:
            return False
        content = self._wishes[0]
        return self._residency.could_reserve(content, Force.IDLE if content.retained else Force.UNUSED)

    def _copy(self, content: Content) -> None:
        """Fill a reserved content from the first tier that has it. Runs on a worker."""
        started_s = time.perf_counter()
        assert content.run is not None
        rows = self._pages.rows(content.run)
        try:
            pulled = self._supply.fetch(content.ref.digest, content.ref.name, rows)
            weights = view(rows, content.layout, content.ref.digest)
        except BytesMayLand as unsettled:
            self._retry(content, unsettled.settled)
            return
        except Exception as error:  # noqa: BLE001 - a worker's boundary: told to the requests that wait
            _log.exception("adapter %s could not be brought in", content.ref.name)
            self._fail(content, error)
            return
        self._arrive(content, weights, time.perf_counter() - started_s)
        if pulled:
            self._keep(content)

    def _arrive(self, content: Content, weights: AdapterWeights, load_s: float) -> None:
        with self._lock:
            self._residency.arrive(content, weights)
            if self._lending is not None and content.run is not None:
                self._lending.lend(content.ref.digest, content.layout, content.run)
            self._loads += 1
            self._load_s += load_s
            self._doom_unwanted(content)
        self._settle()
        self._notify()

    def _keep(self, content: Content) -> None:
        """Keep the packed form of what came from a peer, which may be gone when it is needed again."""
        with self._lock:
            if content.run is None or content.weights is None:
                return
            content.leases += 1
            rows = self._pages.rows(content.run)[: content.layout.nbytes]
            keep = self._retained()
        try:
            self._supply.keep(PackedAdapter(content.ref, content.layout, rows.to("cpu", copy=True)))
            self._supply.trim(keep | {content.ref.digest})
        except OSError as error:
            _log.warning("adapter %s is not kept on disk: %s", content.ref.name, error)
        finally:
            self._unpin([content])

    def _retry(self, content: Content, settled: Future[None]) -> None:
        """Bring the content in elsewhere; its pages go when nothing can land there any more."""
        with self._lock:
            run = self._residency.quarantine(content)
            self._wishes.insert(0, content)
            self._doom_unwanted(content)
        settled.add_done_callback(partial(self._give_back, run))
        self._settle()
        self._notify()

    def _recall(self, digest: str, run: PageRun) -> bool:
        """Stop lending a content that goes; whether its pages are free at once. Under the lock, within `_settle`."""
        if self._lending is None:
            return True
        read = self._lending.recall(digest)
        if not read.done():
            self._recalled.append((run, read))
        return read.done()

    def _give_back(self, run: PageRun, _: Future[None]) -> None:
        with self._lock:
            self._residency.give_back(run)
        self._settle()

    def _fail(self, content: Content, error: Exception) -> None:
        """The content cannot be had: tell its requests, and let its names be read afresh."""
        with self._lock:
            self._residency.abandon(content, error)
            meant = [e for e in self._names.values() if e.ref is not None and e.ref == content.ref]
            for entry in meant:
                self._unbind(entry)
                if entry.folder is None:
                    del self._names[entry.name]
            self._doom_unwanted(content)
        self._settle()
        self._notify()

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()
