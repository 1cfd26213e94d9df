"""Two nodes that lend to each other: whatever is loaded, evicted, pulled, corrupted and read for long, nobody is
served other bytes than the digest's, pages that a peer reads do not change, and in the end nothing is left."""

import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora.directory import StaticDirectory
from lora.errors import UnknownAdapter
from lora.lending import Lending
from lora.lookup import Lookup
from lora.note import rows_name
from lora.peer import Peering, PeerTier
from lora.peer_loop import PeerLoop
from lora.peft import pack
from lora.pool import RankPages
from lora.puller import Puller, PullLimits
from lora.shared_pages import Notebook, SharedPages
from lora.store import AdapterStore
from tests.lora.executors import HeldExecutor
from tests.oracles.adapters import base_shape, write_adapter
from transport.base import Address, Lease
from transport.errors import NotOffered
from transport.loopback import LoopbackNetwork, LoopbackTransport

SHAPE = base_shape()
RANKS = (1, 2, 3, 5, 8)
NAMES = st.sampled_from(["a", "b", "c", "d"])
NODES = st.sampled_from([0, 1])
ADDRESSES = (Address("loopback", 1), Address("loopback", 2))

BASE = "weights"


@lru_cache
def folders() -> tuple[Path, ...]:
    """PEFT folders of every rank, made once."""
    root = Path(tempfile.mkdtemp())
    return tuple(write_adapter(root / str(rank), SHAPE, rank, seed=rank) for rank in RANKS)


@lru_cache
def content(digest: str) -> torch.Tensor:
    """The rows that a digest stands for, read afresh."""
    packed = [pack("x", folder, SHAPE, torch.float32) for folder in folders()]
    return next(one.rows for one in packed if one.ref.digest == digest)


@lru_cache
def loop() -> PeerLoop:
    """One event loop for all examples."""
    return PeerLoop()


class Node:
    """One of the two; the largest adapter takes 22 of its 24 pages."""

    def __init__(self, network: LoopbackNetwork, peer: Address) -> None:
        self.transport = loop().wait(self._join(network))
        self.pages = RankPages(24, 2048)
        shared, self.notebook = SharedPages(self.transport, self.pages), Notebook(self.transport, 1 << 16)
        self.free_notes = self.notebook.free_pages
        directory, limits = StaticDirectory((peer,)), PullLimits(rest_s=0.0)
        tier = PeerTier(
            BASE, self.transport, loop(), shared, directory, Puller(self.transport, self.notebook, limits)
        )
        tier._lookup = Lookup(BASE, tier._puller, directory, absent_s=0.0)
        peering = Peering(tier, Lending(BASE, self.transport, shared, self.notebook))
        self.executor = HeldExecutor()
        self.store = AdapterStore(SHAPE, torch.float32, self.pages, None, self.executor, peering)

    @staticmethod
    async def _join(network: LoopbackNetwork) -> LoopbackTransport:
        return LoopbackTransport("n", network)

    def step(self) -> None:
        """A step that runs nothing, with the copies that are due."""
        self.executor.run()
        self.store.ready()
        self.executor.run()
        self.store.acquire(()).release()


class PeersMachine(RuleBasedStateMachine):
    """Loads, unloads, requests for what the other has, and slow readers, in any order."""

    def __init__(self) -> None:
        super().__init__()
        network = LoopbackNetwork()
        self.nodes = [Node(network, ADDRESSES[1]), Node(network, ADDRESSES[0])]
        self.reading: list[tuple[int, Lease, str]] = []  # which node reads, and what

    @rule(node=NODES, name=NAMES, folder=st.integers(0, len(RANKS) - 1))
    def load(self, node: int, name: str, folder: int) -> None:
        self.nodes[node].store.load(name, folders()[folder])

    @rule(node=NODES, name=NAMES)
    def unload(self, node: int, name: str) -> None:
        if name in self.nodes[node].store.names():
            self.nodes[node].store.unload(name)
        self.nodes[node].step()

    @rule(node=NODES, name=NAMES)
    def ask(self, node: int, name: str) -> None:
        """A request: what it runs with is what its name meant, byte for byte."""
        store = self.nodes[node].store
        try:
            ref = store.resolve(name)
            store.retain(ref)
        except UnknownAdapter:
            return
        for _ in range(6):
            store.prefetch((ref,))
            self.nodes[node].executor.run()
            if ref.digest in store.ready() or ref.digest in store.failed():
                break
            store.acquire(()).release()
        if ref.digest in store.ready():
            with store.acquire((ref,)) as lease:
                weights = next(iter(lease.weights[ref.digest].groups.values())).A
                assert torch.equal(
                    weights.flatten(), content(ref.digest).view(torch.float32)[: weights.numel()]
                )
        else:
            assert self.reading or ref.digest in store.failed()
        store.release(ref)
        self.nodes[node].step()

    @rule(node=NODES, name=NAMES)
    def begin_to_read(self, node: int, name: str) -> None:
        """The other node pins a content and takes its time."""
        ref = self.nodes[1 - node].store.known(name)
        if ref is None or len(self.reading) > 3:
            return
        try:
            reader = self.nodes[node].transport
            lease = loop().wait(reader.lease(ADDRESSES[1 - node], rows_name(ref.digest), 60.0))
        except NotOffered:
            return
        self.reading.append((node, lease, ref.digest))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def end_reading(self, data: st.DataObject) -> None:
        node, lease, _ = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        loop().wait(self.nodes[node].transport.release(lease))
        self.nodes[1 - node].executor.run()

    @invariant()
    def what_is_read_does_not_change(self) -> None:
        for node, lease, digest in self.reading:
            (region,) = lease.regions
            start = region.address - self.nodes[1 - node].pages.arena.data_ptr()
            rows = self.nodes[1 - node].pages.arena[start : start + region.nbytes]
            assert torch.equal(rows, content(digest))

    def teardown(self) -> None:
        while self.reading:
            node, lease, _ = self.reading.pop()
            loop().wait(self.nodes[node].transport.release(lease))
        for node in self.nodes:
            for name in node.store.names():
                node.store.unload(name)
            node.step()
        for node in self.nodes:
            assert node.store.stats().free_pages == node.pages.num_pages
            assert node.notebook.free_pages == node.free_notes
            usage = node.transport.usage()
            assert (usage.names, usage.leases, usage.landings) == (0, 0, 0)


PeersMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestPeers = PeersMachine.TestCase
