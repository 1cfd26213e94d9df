"""AdapterStore: the sole owner of adapters' names, contents and residency.

Front threads load, resolve and retain; the step thread asks what is ready and leases it; workers copy. Whatever
`ready()` has named stays resident until the next `acquire` or `ready()`, so that a plan made from it can always
run: nothing is evicted in between.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from lora.adapter import AdapterRef
from lora.errors import AdapterLost, AdapterRefused, UnknownAdapter
from lora.flat import view
from lora.peft import PackedAdapter, pack
from lora.peft_config import CONFIG_FILE
from lora.pool import RankPages
from lora.residency import Content, Force, Residency
from lora.segments import AdapterWeights
from lora.sites import BaseShape
from lora.tiers import DiskTier, HostTier, PackedTier, SourceTier, Tier

__all__ = ["AdapterEntry", "AdapterStore", "Lease", "StoreStats", "UnknownAdapter"]

_log = logging.getLogger(__name__)
_HOST_BYTES = 256 << 20  # packed forms kept in host memory where there is no disk tier


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A name that requests may use. `ref` is None until the folder was first read."""

    name: str
    folder: Path
    ref: AdapterRef | None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the start, and how full the arena is. `hits` counts where an adapter was found, by tier."""

    resident: int
    resident_bytes: int
    total_pages: int
    free_pages: int
    loads: int
    load_s: float
    evictions: int
    hits: Mapping[str, int]


@dataclass(slots=True)
class _Name:
    """What a name means now. `packing` is held by whoever reads the folder, so that it is read once."""

    folder: Path
    ref: AdapterRef | None = None
    packing: threading.Lock = field(default_factory=threading.Lock)


class Lease:
    """Adapters pinned for a step: `weights` by digest, valid until `release`."""

    def __init__(self, weights: Mapping[str, AdapterWeights], release: Callable[[], None]) -> None:
        self.weights = weights
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the adapters go; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


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
    ) -> None:
        """`workers` is how many threads copy, or the executor to copy with."""
        self._base = base
        self._dtype = dtype
        self._pages = pages
        self._packed: PackedTier = disk or HostTier(_HOST_BYTES)
        self._source = SourceTier(base, dtype)
        self._tiers: tuple[Tier, ...] = (self._packed, self._source)
        self._executor = (
            workers if isinstance(workers, Executor) else ThreadPoolExecutor(workers, "adapter-copy")
        )
        self._lock = threading.Lock()  # guards all that follows
        self._residency = Residency(pages)
        self._names: dict[str, _Name] = {}
        self._wishes: list[Content] = []  # absent and asked for, the most urgent first
        self._doomed: dict[str, Content] = {}  # unwanted, to be dropped as soon as no plan can name them
        self._planning = False  # between ready() and acquire: nothing resident may go
        self._closed = False
        self._callbacks: tuple[Callable[[], None], ...] = ()
        self._hits = {"device": 0, self._packed.name: 0, self._source.name: 0}
        self._loads = 0
        self._load_s = 0.0

    # Names

    def declare(self, name: str, folder: Path) -> None:
        """Remember a name and its PEFT folder; the weights are read when first asked for. Raises AdapterRefused."""
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterRefused(name, f"{folder} has no {CONFIG_FILE}: give a folder saved by PEFT")
        with self._lock:
            self._unbind(self._names.get(name))
            self._names[name] = _Name(folder)
        self._settle()

    def load(self, name: str, folder: Path) -> AdapterRef:
        """Read, check and keep an adapter, then let `name` mean it; what the name meant before stays until unused.

        Resident on return if there are free pages. Raises AdapterRefused, and then nothing has changed.
        """
        packed = self._pack(name, folder)
        self._bind(name, _Name(folder), packed, replaces=None)
        return packed.ref

    def resolve(self, name: str) -> AdapterRef:
        """What `name` means; a declared adapter is read first. Raises UnknownAdapter, AdapterRefused."""
        while True:
            with self._lock:
                entry = self._names.get(name)
                if entry is None:
                    raise UnknownAdapter(name)
                if entry.ref is not None:
                    return entry.ref
            with entry.packing:
                if entry.ref is None:
                    packed = self._pack(name, entry.folder)
                    self._bind(name, entry, packed, replaces=entry)

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
            found = (self._residency.find(ref.digest) for ref in refs)
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
            self._hits["device"] += len(pinned)
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
                hits=dict(self._hits),
            )

    def close(self) -> None:
        """Finish the copies under way and start no more."""
        with self._lock:
            self._closed = True
            self._wishes = []
        self._executor.shutdown(wait=True)

    # Binding names to contents

    def _pack(self, name: str, folder: Path) -> PackedAdapter:
        packed = pack(name, folder, self._base, self._dtype)
        if packed.ref.nbytes > self._pages.nbytes:
            raise AdapterRefused(
                name,
                f"it takes {packed.ref.nbytes} bytes, all memory for adapters is {self._pages.nbytes} bytes:"
                " give the engine more adapter memory",
            )
        try:
            self._packed.put(packed)
        except OSError as error:
            raise AdapterRefused(
                name, f"its packed form cannot be kept ({error}): free space or choose another cache folder"
            ) from error
        return packed

    def _bind(self, name: str, entry: _Name, packed: PackedAdapter, replaces: _Name | None) -> None:
        """Let `name` mean the packed content, unless it has come to mean something else than `replaces`."""
        started_s = time.perf_counter()
        with self._lock:
            current = self._names.get(name)
            if replaces is not None and current is not replaces:
                return
            content = self._residency.admit(packed.ref, packed.layout, self._packed.cost_s(packed.ref.nbytes))
            content.names += 1
            self._unbind(current)
            entry.ref = packed.ref
            self._names[name] = entry
            self._source.remember(packed.ref.digest, name, entry.folder)
            placed = content.run is None and self._residency.reserve(content, Force.FREE_PAGES)
            keep = {c.ref.digest for c in self._residency.contents if c.retained}
        if placed:
            self._fill(content, packed, started_s)
        self._packed.trim(keep | {packed.ref.digest})
        self._settle()

    def _fill(self, content: Content, packed: PackedAdapter, started_s: float) -> None:
        """Bring a content in from the form just packed."""
        assert content.run is not None
        rows = self._pages.rows(content.run)
        rows[: packed.rows.numel()].copy_(packed.rows)
        self._arrive(content, view(rows, packed.layout, packed.ref.digest), time.perf_counter() - started_s)

    def _unbind(self, entry: _Name | None) -> None:
        """One name fewer for the content it meant. Under the lock."""
        if entry is None or entry.ref is None:
            return
        content = self._residency.find(entry.ref.digest)
        entry.ref = None
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
        for content in granted:
            self._executor.submit(self._copy, content)
        if stuck:  # an idle loop must begin a step for anything to go
            self._notify()

    def _drop_doomed(self) -> None:
        for digest, content in tuple(self._doomed.items()):
            if content.wanted or self._residency.drop_unwanted(content):
                del self._doomed[digest]
                if not content.wanted:
                    self._source.forget(digest)

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
            tier = self._fetch(content, rows)
            weights = view(rows, content.layout, content.ref.digest)
        except Exception as error:  # noqa: BLE001 - a worker's boundary: told to the requests that wait
            _log.exception("adapter %s could not be brought in", content.ref.name)
            self._fail(content, error)
            return
        with self._lock:
            self._hits[tier.name] += 1
        self._arrive(content, weights, time.perf_counter() - started_s)

    def _fetch(self, content: Content, rows: torch.Tensor) -> Tier:
        for tier in self._tiers:
            if tier.fetch(content.ref.digest, rows):
                return tier
        raise AdapterLost(content.ref.name, "no tier has its content any more: load it again")

    def _arrive(self, content: Content, weights: AdapterWeights, load_s: float) -> None:
        with self._lock:
            self._residency.arrive(content, weights)
            self._loads += 1
            self._load_s += load_s
            self._doom_unwanted(content)
        self._settle()
        self._notify()

    def _fail(self, content: Content, error: Exception) -> None:
        """The content cannot be had: tell its requests, and let its names be read afresh."""
        with self._lock:
            self._residency.abandon(content, error)
            for entry in self._names.values():
                if entry.ref is not None and entry.ref.digest == content.ref.digest:
                    self._unbind(entry)
            self._doom_unwanted(content)
        self._settle()
        self._notify()

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()
