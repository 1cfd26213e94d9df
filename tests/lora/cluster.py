"""Several nodes of one process that share adapters, with transports that can fail, wait, or leave bytes under way."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora.adapter import AdapterRef
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.peers.directory import StaticDirectory
from lora.peers.discovery import NameDiscovery
from lora.peers.loop_thread import LoopThread
from lora.peers.peer_tier import Peering, PeerTier
from lora.peers.publisher import Publisher
from lora.peers.puller import Puller, PullLimits
from lora.peers.regions import ManifestBuffers, PageRegions
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from scheduler.residency import CheapestWindow
from tests.lora.executors import InlineExecutor
from tests.oracles.adapters import base_shape, write_adapter
from transport.base import Address, Lease, Region
from transport.errors import PullTimeout
from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.memory.local_memory import LocalMemory

BASE = base_shape()
PAGE_BYTES = 4096
PAGES_OF_RANK_4 = 6
NOBODY = Address("loopback", 99)

R = TypeVar("R")


class HeldMemory(LocalMemory):
    """A node's memory in which some regions settle when the test says so."""

    def __init__(self, name: str, unsettled: Mapping[Region, Future[None]]) -> None:
        super().__init__(name)
        self._unsettled = unsettled

    def settled(self, region: Region) -> Future[None]:
        return self._unsettled.get(region) or super().settled(region)


class HeldTransport(LoopbackTransport):
    """A loopback node whose pulls can be made to fail, to wait, or to leave bytes under way."""

    def __init__(self, name: str, network: LoopbackNetwork) -> None:
        super().__init__(name, network)
        self.pulled: list[str] = []
        self.asked: list[str] = []
        self.begun = threading.Event()
        self.go_on: asyncio.Event | None = None  # pulls of rows wait for it
        self.under_way: list[Future[None]] = []  # for each pull of rows that shall time out, what settles it
        self.unsettled: dict[Region, Future[None]] = {}
        self.memory = HeldMemory(name, self.unsettled)

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        self.asked.append(name)
        return await super().lease(peer, name, hold_s)

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        if lease.name.startswith("rows/"):
            self.begun.set()
            if self.under_way:
                self.unsettled[into[0]] = self.under_way.pop()
                await self.release(lease)
                raise PullTimeout("the test says so")
            if self.go_on is not None:
                await self.go_on.wait()
        await super().pull(lease, into, timeout_s)
        self.pulled.append(lease.name)


@dataclass
class Node:
    """One store, its pages and its transport."""

    loop: LoopThread
    transport: HeldTransport
    pages: RankPages
    shared: PageRegions
    copies: RankPages
    buffers: ManifestBuffers
    store: AdapterStore
    free_buffers: int = field(init=False)

    def __post_init__(self) -> None:
        self.free_buffers = self.buffers.free_pages

    def bring(self, ref: AdapterRef) -> bool:
        """Ask for an adapter as a live request does; whether it is resident then."""
        self.store.retain(ref)
        self.store.loader.prefetch((ref,))
        ready = ref.digest in self.store.ready()
        self.store.acquire(()).release()
        self.store.release(ref)
        return ready

    def rows(self, ref: AdapterRef) -> torch.Tensor:
        """The first matrix of a resident adapter."""
        assert ref.digest in self.store.ready()
        with self.store.acquire((ref,)) as lease:
            return next(iter(lease.weights[ref.digest].groups.values())).A.clone()

    def assert_nothing_is_left(self) -> None:
        """Every name gone, every page, lease, landing and note must be free."""
        for name in self.store.registry.names():
            self.store.registry.unload(name)
        self.store.ready()
        self.store.acquire(()).release()
        assert self.store.stats().free_pages == self.pages.num_pages
        assert self.copies.free_pages == self.copies.num_pages
        assert self.buffers.free_pages == self.free_buffers
        usage = self.transport.memory.usage()
        assert (usage.names, usage.leases, usage.destinations) == (0, 0, 0)


class Cluster:
    """Nodes of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loop = LoopThread()
        self.network = LoopbackNetwork()

    def node(
        self,
        *peers: Address,
        adapters_that_fit: int = 2,
        workers: int | InlineExecutor | None = None,
        weights: str = "weights",
        copies_that_fit: int = 2,
        disk: Path | None = None,
        absent_s: float = 5.0,
    ) -> Node:
        """A node that asks `peers`, over the base model of digest `weights`."""
        transport = self.run(self._transport())
        pages = RankPages(adapters_that_fit * PAGES_OF_RANK_4, PAGE_BYTES)
        shared, buffers = PageRegions(transport, pages), ManifestBuffers(transport, 1 << 20)
        puller = Puller(transport, buffers, PullLimits(pulls=2, backoff_s=0.0))
        directory = StaticDirectory(peers)
        tier = PeerTier(weights, transport, self.loop, shared, directory, puller)
        tier._discovery = NameDiscovery(weights, puller, directory, absent_s)
        copies = RankPages(copies_that_fit * PAGES_OF_RANK_4, PAGE_BYTES)
        publisher = Publisher(weights, transport, shared, buffers, copies, InlineExecutor())
        peering = Peering(tier, publisher)
        kept = DiskTier(disk) if disk else None
        residency = Residency(pages, CheapestWindow())
        store = AdapterStore(BASE, torch.float32, residency, kept, workers or InlineExecutor(), peering)
        return Node(self.loop, transport, pages, shared, copies, buffers, store)

    def load(self, node: Node, seed: int) -> AdapterRef:
        """Load an adapter of rank 4 with content of its own for each seed, as `a{seed}`."""
        return node.store.registry.load(f"a{seed}", self.folder(seed))

    def folder(self, seed: int) -> Path:
        """A PEFT folder of rank 4 with content of its own for each seed."""
        return write_adapter(self.root / str(seed), BASE, 4, seed)

    def close(self, node: Node) -> None:
        """The node is gone from the network."""
        self.run(node.transport.close())

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        return self.loop.wait(work)

    async def _transport(self) -> HeldTransport:
        return HeldTransport("n", self.network)
