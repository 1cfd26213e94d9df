"""Own the adapters of a node: their names, their contents, and who uses them.

Front threads load, resolve and retain; the step thread asks what is ready and leases it; workers load. What `ready()`
has named stays resident until the next `acquire` or `ready()`, so that a plan made from it can always run.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch

from lora.adapter import AdapterRef
from lora.daemon_threads import DaemonExecutor, DeadlineCalls
from lora.errors import UnknownAdapter
from lora.format.companions import CompanionsCheck
from lora.format.peft import most_file_bytes
from lora.memory.residency import Residency
from lora.peers.peer_stats import PublishStats
from lora.peers.peer_tier import Peering
from lora.peers.published_weights import LocalAdapters
from lora.segments import AdapterLease
from lora.sources.source_folders import NOTHING_FETCHED, SourceFolders, SourceOptions
from lora.store.kept_adapters import KeptAdapters
from lora.store.loader import AdapterLoader
from lora.store.names.refresh import NameRefresher
from lora.store.names.trial import AdapterTrial
from lora.store.registry import AdapterRegistry
from lora.store.stats import StoreStats
from lora.store.tier_chain import TierChain
from lora.store.tiers import DiskTier, HostTier
from lora.target_modules import BaseShape

_HOST_BYTES = 256 << 20  # packed forms kept in host memory where there is no disk tier


@dataclass(frozen=True, slots=True)
class StoreThreads:
    """What loads run with: how many threads, or an executor; and `files`, which bounds the wait for a file."""

    loads: int | Executor = 1
    files: DeadlineCalls = field(default_factory=DeadlineCalls)


class AdapterStore:
    """Adapters and their users. Callers hold the parts: `registry` for names, `loader` for loads, `contents` for the
    memory that they take, `refresher` for names that peers told, `kept` for a coordinator.

    It has no lock: each part has its own, taken in the order registry, contents. Every method may be called from any
    thread; `ready`, `acquire` and AdapterLease.release are the step thread's.
    """

    def __init__(
        self,
        base: BaseShape,
        dtype: torch.dtype,
        residency: Residency,
        disk: DiskTier | None,
        workers: int | Executor | StoreThreads = 1,
        peering: Peering | None = None,
        sources: SourceOptions = NOTHING_FETCHED,
    ) -> None:
        """Own `residency`, which knows nothing yet; `peering` shares its arena.

        `workers` is how many threads load, or the executor to load with. `sources` says what may be fetched.
        """
        threads = workers if isinstance(workers, StoreThreads) else StoreThreads(workers)
        most_bytes = residency.pages.nbytes
        publisher = peering.publisher if peering else None
        peer_tier = peering.tier if peering else None
        self._fetched = SourceFolders(sources, most_file_bytes(most_bytes, dtype))
        tiers = TierChain(base, dtype, disk or HostTier(_HOST_BYTES), peer_tier, threads.files, self._fetched)
        loads = threads.loads
        executor = loads if isinstance(loads, Executor) else DaemonExecutor(loads, "adapter-load")
        weights = publisher.weights if publisher else None
        self.loader = AdapterLoader(
            residency, tiers, weights, executor, lambda content, error: self.registry.lose(content, error)
        )
        self.contents = self.loader.contents
        manifests = publisher.manifests if publisher else None
        self.registry = AdapterRegistry(self.loader, tiers, manifests, most_bytes, self._fetched)
        self.refresher = NameRefresher(
            self.registry.remote, tiers, most_bytes, peering.refresh_s if peering else None
        )
        self.kept = KeptAdapters(self.registry, self.loader, peering.directory if peering else None)
        self.page_bytes = residency.pages.page_bytes
        self._tiers = tiers
        self._published = weights
        if publisher is not None:
            publisher.open(
                LocalAdapters(
                    self.registry.declares, self.registry.read, self.contents.layout, tiers.fetch_here
                )
            )

    def check_companions(self, check: CompanionsCheck) -> None:
        """Have `check` refuse adapters by what lies beside their weights. To be called before any name is declared."""
        self._tiers.check_companions(check)

    def try_contents(self, trial: AdapterTrial) -> None:
        """Have `trial` compute with each adapter before its name is served. To be called before any is loaded."""
        self.registry.trials.use(trial)

    def retain(self, ref: AdapterRef) -> None:
        """Keep a content for a live request until it is released. Raises UnknownAdapter if it is gone."""
        if not ref.is_base and not self.contents.retain(ref.digest):
            raise UnknownAdapter(ref.name)

    def release(self, ref: AdapterRef) -> None:
        """Undo one `retain`."""
        if not ref.is_base:
            self.contents.release(ref.digest)

    def failed(self) -> Mapping[str, Exception]:
        """Tell why retained contents cannot be had, by digest; gone once their requests have released them."""
        return self.contents.failures()

    def ready(self) -> frozenset[str]:
        """Begin a step, and return the digests of the resident contents."""
        return self.contents.begin_plan()

    def make_way(self, ref: AdapterRef | None, running: frozenset[str]) -> frozenset[str]:
        """Have pages emptied for an adapter whose requests have waited too long, or for none any more.

        Returns the digests that are to leave: no other sequence of theirs should begin, and those that running
        sequences use, which `running` names, go when they run no more.
        """
        return self.contents.make_way(ref.digest if ref is not None else None, running)

    def acquire(self, refs: Iterable[AdapterRef]) -> AdapterLease:
        """Pin adapters that the last `ready()` named; never waits."""
        contents, weights = self.contents.lease(refs)
        return AdapterLease(weights, lambda: self.loader.end_lease(contents))

    def stats(self) -> StoreStats:
        """Take a snapshot."""
        contents = self.contents.stats()
        resident, resident_bytes = contents.resident
        return StoreStats(
            resident=resident,
            resident_bytes=resident_bytes,
            census=contents.census,
            nbytes=self._tiers.nbytes,
            total_pages=contents.total_pages,
            free_pages=contents.free_pages,
            loads=contents.loads,
            load_s=contents.load_s,
            evictions=contents.evictions,
            hits={"device": contents.leases, **self._tiers.hits},
            fallbacks=self._tiers.fallbacks,
            seconds=self._tiers.seconds,
            peers=self._tiers.peer_stats,
            published=self._published.stats if self._published else PublishStats(),
        )

    def tiers_of(self, digests: Iterable[str]) -> dict[str, str]:
        """Name the nearest tier, the device apart, that each content can be had from. It may wait for the disk."""
        return self._tiers.nearest(digests)

    def close(self) -> None:
        """Start no more loads, and wait for those under way, as long as the executor waits."""
        self.refresher.close()
        self.loader.close()
        self._fetched.close()
