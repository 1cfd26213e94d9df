"""Three nodes that lend to each other: whatever is loaded, reloaded, unloaded, evicted, pulled, forged and read for
long, and whoever dies, nobody is served other bytes than the digest's, what one node has anywhere the others get,
what a peer reads does not change, names come to mean what their owners say, and in the end nothing is left."""

import atexit
import ctypes
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora.adapter import AdapterRef
from lora.errors import AdapterUnreachable, UnknownAdapter
from lora.format.peft import pack
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.peers.discovery import NameDiscovery
from lora.peers.loop_thread import LoopThread
from lora.peers.manifest import MOST_HOPS, weights_name
from lora.peers.peer_tier import Peering, PeerTier
from lora.peers.publisher import Publisher
from lora.peers.puller import Puller, PullLimits
from lora.peers.regions import ManifestBuffers, PageRegions
from lora.store.store import AdapterStore
from scheduler.residency import CheapestWindow
from tests.chance import examples
from tests.lora.executors import HeldExecutor, InlineExecutor
from tests.oracles.adapters import base_shape, write_adapter
from transport.base import Address, Lease, Region
from transport.errors import NotOffered
from transport.loopback import LoopbackNetwork, LoopbackTransport

SHAPE = base_shape()
RANKS = (1, 2, 3, 5, 8)
NUM_NODES = 3
NAMES = st.sampled_from(["a", "b", "c", "d"])
NODES = st.integers(0, NUM_NODES - 1)
FOLDERS = st.integers(0, len(RANKS) - 1)
PAGE_BYTES = 2048
NUM_PAGES = 24  # the largest adapter takes 22
BASE = "weights"


@pytest.fixture(autouse=True, scope="module")
def _no_patience() -> Iterator[None]:
    """Jobs run on the event loop here, where nobody may wait for a reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.peers.published_weights._ROOM_PATIENCE_S", 0.0)
        yield


@lru_cache
def folders() -> tuple[Path, ...]:
    """PEFT folders of every rank, made once."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    return tuple(write_adapter(root / str(rank), SHAPE, rank, seed=rank) for rank in RANKS)


@lru_cache
def contents() -> dict[str, torch.Tensor]:
    """The rows that each digest stands for, read afresh; in the order of the folders."""
    packed = [pack("x", folder, SHAPE, torch.float32) for folder in folders()]
    return {one.ref.digest: one.rows for one in packed}


def digest_of(folder: int) -> str:
    """The content of a folder."""
    return tuple(contents())[folder]


@lru_cache
def loop() -> LoopThread:
    """One event loop for all examples."""
    return LoopThread()


class ForgedTransport(LoopbackTransport):
    """A loopback node that can be told to receive one wrong byte."""

    forged = False

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        await super().pull(lease, into, timeout_s)
        if self.forged and lease.name.startswith("rows/"):
            self.forged = False
            into[0].view()[7] ^= 1


class OtherNodes:
    """The directory of one node: all the others, dead ones too."""

    def __init__(self, addresses: list[Address | None], mine: int) -> None:
        self._addresses = addresses
        self._mine = mine

    def peers(self) -> Sequence[Address]:
        """See `Directory`."""
        found = [address for at, address in enumerate(self._addresses) if at != self._mine]
        return [address for address in found if address is not None]

    def holders(self, digest: str) -> Sequence[Address]:
        """See `Directory`."""
        return self.peers()


class Node:
    """One of the three, and what an operator has loaded there: folders by name."""

    def __init__(self, network: LoopbackNetwork, addresses: list[Address | None], mine: int) -> None:
        self.transport = loop().wait(self._join(network))
        addresses[mine] = self.transport.address
        self.alive = True
        self.owned: dict[str, int] = {}
        self.pages = RankPages(NUM_PAGES, PAGE_BYTES)
        self.copies = RankPages(NUM_PAGES, PAGE_BYTES)
        shared, self.buffers = (
            PageRegions(self.transport, self.pages),
            ManifestBuffers(self.transport, 1 << 16),
        )
        self.free_buffers = self.buffers.free_pages
        directory = OtherNodes(addresses, mine)
        puller = Puller(self.transport, self.buffers, PullLimits(backoff_s=0.0))
        tier = PeerTier(BASE, self.transport, loop(), shared, directory, puller)
        tier._discovery = NameDiscovery(BASE, puller, directory, absent_s=0.0)
        publisher = Publisher(BASE, self.transport, shared, self.buffers, self.copies, InlineExecutor())
        self.executor = HeldExecutor()
        residency = Residency(self.pages, CheapestWindow())
        self.store = AdapterStore(
            SHAPE, torch.float32, residency, None, self.executor, Peering(tier, publisher)
        )

    @staticmethod
    async def _join(network: LoopbackNetwork) -> ForgedTransport:
        return ForgedTransport("n", network)

    def step(self) -> None:
        """A step that runs nothing, with the copies that are due."""
        self.executor.run()
        self.store.ready()
        self.executor.run()
        self.store.acquire(()).release()

    def assert_nothing_is_left(self) -> None:
        """Every name goes; then every page, lease, landing and note must be free."""
        for name in self.store.registry.names():
            self.store.registry.unload(name)
        self.step()
        assert self.store.stats().free_pages == self.pages.num_pages
        assert self.copies.free_pages == self.copies.num_pages
        assert self.buffers.free_pages == self.free_buffers
        usage = self.transport.memory.usage()
        assert (usage.names, usage.leases, usage.destinations) == (0, 0, 0)


class PeersMachine(RuleBasedStateMachine):
    """Operators, requests, slow readers, forgers and deaths, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.network = LoopbackNetwork()
        self.addresses: list[Address | None] = [None] * NUM_NODES
        self.nodes = [Node(self.network, self.addresses, at) for at in range(NUM_NODES)]
        self.reading: list[tuple[int, int, Lease, str]] = []  # the reader, whom it reads, and what

    @rule(node=NODES, name=NAMES, folder=FOLDERS)
    def load(self, node: int, name: str, folder: int) -> None:
        self.nodes[node].store.registry.load(name, folders()[folder])
        self.nodes[node].owned[name] = folder

    @rule(node=NODES, name=NAMES, folder=FOLDERS)
    def declare(self, node: int, name: str, folder: int) -> None:
        self.nodes[node].store.registry.declare(name, folders()[folder])
        self.nodes[node].owned[name] = folder

    @rule(node=NODES, name=NAMES)
    def unload(self, node: int, name: str) -> None:
        if name in self.nodes[node].store.registry.names():
            self.nodes[node].store.registry.unload(name)
            self.nodes[node].owned.pop(name, None)
        self.nodes[node].step()

    @rule(node=NODES)
    def forge(self, node: int) -> None:
        self.nodes[node].transport.forged = True

    @rule(node=NODES, name=NAMES)
    def ask(self, node: int, name: str) -> None:
        """A request: what it runs with is what its name meant, byte for byte."""
        asked = self.nodes[node]
        trouble = asked.transport.forged or bool(self.reading)
        owners = [other for other in self.nodes if other.alive and name in other.owned]
        if not owners or not asked.alive:
            with suppress(UnknownAdapter, AdapterUnreachable):
                self.run(asked, asked.store.registry.resolve(name), trouble)
            return
        ref = asked.store.registry.resolve(name)
        if name in asked.owned:
            assert ref.digest == digest_of(asked.owned[name])
        self.run(asked, ref, trouble)

    def run(self, asked: Node, ref: AdapterRef, trouble: bool) -> None:
        """One live request."""
        store = asked.store
        store.retain(ref)
        self.wait(asked, ref, trouble)
        store.release(ref)
        asked.step()

    def wait(self, asked: Node, ref: AdapterRef, trouble: bool) -> None:
        """Step until it has come or failed."""
        store = asked.store
        for _ in range(6):
            store.loader.prefetch((ref,))
            asked.executor.run()
            if ref.digest in store.ready() or ref.digest in store.failed():
                break
            store.acquire(()).release()
        if ref.digest in store.ready():
            with store.acquire((ref,)) as lease:
                found = next(iter(lease.weights[ref.digest].groups.values())).A.flatten()
                assert torch.equal(found, contents()[ref.digest].view(torch.float32)[: found.numel()])
            return
        store.acquire(()).release()
        owned = {digest_of(folder) for other in self.nodes if other.alive for folder in other.owned.values()}
        assert trouble or not asked.alive or ref.digest not in owned, "somebody has it"

    @rule(node=NODES, source=NODES, name=NAMES)
    def begin_to_read(self, node: int, source: int, name: str) -> None:
        """A node pins a content of another, resident or not, and takes its time."""
        ref, reader = self.nodes[source].store.registry.known(name), self.nodes[node]
        alive = reader.alive and self.nodes[source].alive
        if ref is None or node == source or not alive or len(self.reading) > 3:
            return
        try:
            lease = loop().wait(
                reader.transport.lease(self.nodes[source].transport.address, weights_name(ref.digest), 60.0)
            )
        except NotOffered:
            assert self.reading or name not in self.nodes[source].owned
            return
        self.reading.append((node, source, lease, ref.digest))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def end_reading(self, data: st.DataObject) -> None:
        self._end(self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1))))

    @rule(node=NODES)
    def die(self, node: int) -> None:
        """The node is gone from the network; its own requests go on with what it has."""
        mine = [one for one in self.reading if node in one[:2]]
        self.reading = [one for one in self.reading if node not in one[:2]]
        for one in mine:
            self._end(one)
        loop().wait(self.nodes[node].transport.close())
        self.nodes[node].alive = False

    @rule(node=NODES)
    def start_again(self, node: int) -> None:
        """Another incarnation, which has nothing, in place of a dead one."""
        if not self.nodes[node].alive:
            self.nodes[node] = Node(self.network, self.addresses, node)

    @rule(node=NODES)
    def review(self, node: int) -> None:
        self.nodes[node].store.refresher.refresh()

    @precondition(lambda self: all(node.alive for node in self.nodes))
    @rule()
    def review_all(self) -> None:
        """Nobody is silent and nothing changes: then every name means what an owner of it says, or is forgotten."""
        for _ in range(2 * (MOST_HOPS + 1)):
            for node in self.nodes:
                node.store.refresher.refresh()
        for node in self.nodes:
            for name in node.store.registry.names():
                owners = {
                    digest_of(other.owned[name])
                    for other in ([node] if name in node.owned else self.nodes)
                    if name in other.owned
                }
                ref = node.store.registry.known(name)
                assert owners, f"{name} is remembered, and nobody owns it"
                assert ref is None or ref.digest in owners

    @invariant()
    def what_is_read_does_not_change(self) -> None:
        for _, _, lease, digest in self.reading:
            (region,) = lease.regions
            rows = ctypes.string_at(region.address, region.nbytes)
            assert rows == contents()[digest].numpy().tobytes()

    def _end(self, reading: tuple[int, int, Lease, str]) -> None:
        reader, source, lease, _ = reading
        loop().wait(self.nodes[reader].transport.release(lease))
        self.nodes[source].executor.run()

    def teardown(self) -> None:
        while self.reading:
            self._end(self.reading.pop())
        for node in self.nodes:
            for name in node.store.registry.names():
                node.store.registry.unload(name)
            node.step()
        for node in self.nodes:
            node.assert_nothing_is_left()


PeersMachine.TestCase.settings = settings(deadline=None, max_examples=examples(60), stateful_step_count=40)
TestPeers = PeersMachine.TestCase
