"""Own adapters: their names, contents and residency.

Front threads load, resolve and retain; the step thread asks what is ready and leases it; workers copy.
AdapterRegistry keeps names, AdapterLoader pages and bytes; the store counts who uses a content. Whatever `ready()`
has named stays resident until the next `acquire` or `ready()`, so that a plan made from it can always run.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora.adapter import AdapterRef
from lora.errors import UnknownAdapter
from lora.format.packed import PackedLayout
from lora.memory.residency import Content, Residency
from lora.names import AdapterEntry
from lora.peers.peer_tier import Peering, PeerStats
from lora.peers.published_weights import PublishStats
from lora.segments import AdapterLease
from lora.store.loader import AdapterLoader
from lora.store.refresh import NameRefresher
from lora.store.registry import AdapterRegistry
from lora.store.tier_chain import TierChain
from lora.store.tiers import DiskTier, HostTier
from lora.target_modules import BaseShape

_HOST_BYTES = 256 << 20  # packed forms kept in host memory where there is no disk tier


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the start, and how full the arena is.

    `hits` counts where an adapter was found, by tier, `seconds` how long what a tier gave took, `fallbacks` how often
    a tier was asked in vain.
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
    seconds: Mapping[str, float] = field(default_factory=dict)
    peers: PeerStats = field(default_factory=PeerStats)
    lent: PublishStats = field(default_factory=PublishStats)


class AdapterStore:
    """Names and contents of adapters, and the copies between tiers. Every method may be called from any thread;
    `ready`, `acquire` and AdapterLease.release are the step thread's."""

    def __init__(
        self,
        base: BaseShape,
        dtype: torch.dtype,
        residency: Residency,
        disk: DiskTier | None,
        workers: int | Executor = 1,
        peering: Peering | None = None,
    ) -> None:
        """Own `residency`, which knows nothing yet; `peering` shares its arena.

        `workers` is how many threads copy, or the executor to copy with.
        """
        self._pages = pages = residency.pages
        self._lending = lending = peering.lending if peering else None
        self._supply = TierChain(
            base, dtype, disk or HostTier(_HOST_BYTES), peering.tier if peering else None
        )
        executor = workers if isinstance(workers, Executor) else ThreadPoolExecutor(workers, "adapter-copy")
        self._lock = threading.Lock()  # guards names, residency, and what hangs on them
        self._traffic = AdapterLoader(
            self._lock, residency, self._supply, lending, executor, self._forget_names_of
        )
        self._naming = AdapterRegistry(self._lock, self._traffic, self._supply, lending, pages.nbytes)
        self._residency = residency
        self._hits = 0
        self._freshness: NameRefresher | None = None
        if peering is not None:
            self._freshness = NameRefresher(self._naming, self._supply, pages.nbytes, peering.review_s)
            peering.lending.open(self)

    # Names

    def declare(self, name: str, folder: Path) -> None:
        """Remember a name and its PEFT folder; the weights are read when first asked for. Raises AdapterRefused."""
        self._naming.declare(name, folder)

    def load(self, name: str, folder: Path) -> AdapterRef:
        """Read, check and keep an adapter, then let `name` mean it; what the name meant before stays until unused.

        Resident on return if there are free pages. Raises AdapterRefused, and then nothing has changed.
        """
        return self._naming.load(name, folder)

    def known(self, name: str) -> AdapterRef | None:
        """What `name` means, if that can be told without waiting."""
        return self._naming.known(name)

    def resolve(self, name: str) -> AdapterRef:
        """What `name` means; a declared adapter is read first, and peers are asked for one that is not known.

        Raises UnknownAdapter, AdapterRefused; AdapterUnreachable if not all peers could be asked.
        """
        return self._naming.resolve(name)

    def unload(self, name: str) -> None:
        """Forget a name at once; its content goes when no live request uses it. Raises UnknownAdapter."""
        self._naming.unload(name)

    def names(self) -> tuple[str, ...]:
        """All names, in order of registration."""
        return self._naming.names()

    def entries(self) -> tuple[AdapterEntry, ...]:
        """All names with what they mean."""
        return self._naming.entries()

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
            self._traffic.doom_unwanted(content)
        self._traffic.settle()

    def prefetch(self, refs: Iterable[AdapterRef]) -> None:
        """Ask for these contents, the most urgent first, in place of what was asked for before. Never waits."""
        self._traffic.wish(dict.fromkeys(ref.digest for ref in refs))

    def failed(self) -> Mapping[str, Exception]:
        """Why retained contents cannot be had, by digest; gone once their requests have released them."""
        with self._lock:
            contents = self._residency.contents
            return {c.ref.digest: c.failure for c in contents if c.failure is not None and c.retained}

    # Steps

    def ready(self) -> frozenset[str]:
        """Digests of the resident contents; begins a step."""
        return self._traffic.open_plan()

    def acquire(self, refs: Iterable[AdapterRef]) -> AdapterLease:
        """Pin adapters that the last `ready()` named; never waits."""
        with self._lock:
            pinned = [self._pinnable(ref) for ref in refs if not ref.is_base]
            weights = {content.ref.digest: self._residency.lease(content) for content in pinned}
            self._hits += len(pinned)
            self._traffic.close_plan()
        self._traffic.settle()
        return AdapterLease(weights, lambda: self._traffic.unpin(pinned))

    # Sharing the arena's memory with others

    def lacking_pages(self) -> int:
        """How many more pages at the arena's end a live request's adapter waits for."""
        return self._traffic.lacking_pages()

    def lacks_headroom(self) -> bool:
        """Whether the largest adapter that is resident would not find its pages once more."""
        return self._traffic.lacks_headroom()

    def could_cede(self, pages: int) -> bool:
        """Whether `cede` would; between steps, as it."""
        return self._traffic.could_cede(pages)

    def cede(self, pages: int) -> bool:
        """Give up the arena's last `pages` pages if no live request uses what lies there. Between steps."""
        return self._traffic.cede(pages)

    def extend(self, pages: int) -> None:
        """Take over the arena's next `pages` pages."""
        self._traffic.extend(pages)

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, from any thread and with no lock held, when a step may find more to run or to
        fail than the last one did."""
        self._traffic.on_ready(callback)

    def stats(self) -> StoreStats:
        """A snapshot."""
        with self._lock:
            resident = [c for c in self._residency.contents if c.weights is not None]
            return StoreStats(
                resident=len(resident),
                resident_bytes=sum(c.nbytes for c in resident),
                total_pages=self._pages.num_pages,
                free_pages=self._pages.free_pages,
                loads=self._traffic.loads,
                load_s=self._traffic.load_s,
                evictions=self._residency.evictions,
                hits={"device": self._hits, **self._supply.hits},
                fallbacks=self._supply.fallbacks,
                seconds=self._supply.seconds,
                peers=self._supply.peer_stats,
                lent=self._lending.stats if self._lending else PublishStats(),
            )

    def close(self) -> None:
        """Finish the copies under way and start no more."""
        if self._freshness is not None:
            self._freshness.close()
        self._traffic.close()

    # Peers

    def review(self) -> None:
        """Ask peers again what the names mean that they told; see NameRefresher. Waits."""
        if self._freshness is not None:
            self._freshness.review()

    def declares(self, name: str) -> bool:
        """See Stock."""
        return self._naming.declares(name)

    def read(self, name: str) -> None:
        """See Stock."""
        self._naming.read(name)

    def layout(self, digest: str) -> PackedLayout | None:
        """See Stock."""
        with self._lock:
            content = self._residency.find(digest)
            return content.layout if content else None

    def fetch_here(self, digest: str, destination: Tensor) -> bool:
        """See Stock."""
        return self._supply.fetch_here(digest, destination)

    def _pinnable(self, ref: AdapterRef) -> Content:
        content = self._residency.find(ref.digest)
        assert content is not None, f"{ref} is not known: only what ready() names can run"
        return content

    def _forget_names_of(self, content: Content) -> None:
        """The content was lost. Under the lock."""
        self._naming.lost(content)
