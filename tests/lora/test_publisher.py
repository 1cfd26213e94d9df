"""What a node has anywhere its peers may have: resident, in host memory, on disk, or in a folder nobody has read yet.
Nothing that the node runs is displaced for it, and its memory has a bound."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from lora.adapter import AdapterRef
from lora.errors import AdapterLost, UnknownAdapter
from lora.format.packed import PackedLayout
from lora.memory.base import PageRun
from lora.memory.pages import RankPages
from lora.peers.manifest import MOST_MANIFEST_BYTES, manifest_name, weights_name
from lora.peers.published_weights import LocalAdapters, PublishedWeights
from lora.peers.regions import PageRegions
from tests.lora.cluster import BASE, PAGE_BYTES, PAGES_OF_RANK_4, Cluster, Node
from tests.lora.executors import HeldExecutor
from transport.base import Lease
from transport.errors import NotOffered
from transport.loopback import LoopbackNetwork, LoopbackTransport


def evicted(
    cluster: Cluster, *, disk: Path | None = None, copies_that_fit: int = 2
) -> tuple[Node, AdapterRef]:
    """A node with room for one resident adapter, and the one that is not resident."""
    node = cluster.node(adapters_that_fit=1, disk=disk, copies_that_fit=copies_that_fit)
    cluster.load(node, 1)
    return node, cluster.load(node, 2)


def lease(cluster: Cluster, reader: Node, source: Node, ref: AdapterRef) -> Lease:
    """Pin a content's rows at the source."""
    return cluster.run(reader.transport.lease(source.transport.address, weights_name(ref.digest), 10.0))


@pytest.mark.parametrize("tier", ["host", "disk", "folder"])
def test_what_is_not_resident_is_published_all_the_same(cluster: Cluster, tier: str, tmp_path: Path) -> None:
    a, ref = evicted(cluster, disk=tmp_path / "cache" if tier == "disk" else None)
    if tier == "folder":
        a.store._tiers._packed._rows.clear()  # pyright: ignore  (host memory was trimmed)
    resident = a.store.ready()
    a.store.acquire(()).release()
    b = cluster.node(a.transport.address)
    assert b.bring(b.store.registry.resolve("a2"))
    assert torch.equal(b.rows(ref), a_copy_of(cluster, 2))
    assert a.store.ready() == resident, "peers displace nothing"
    a.store.acquire(()).release()
    assert (a.store.stats().published.copies, b.store.stats().hits["peer"]) == (1, 1)
    for node in (a, b):
        node.assert_nothing_is_left()


def a_copy_of(cluster: Cluster, seed: int) -> torch.Tensor:
    """The first matrix of an adapter, as a node without peers has it."""
    alone = cluster.node()
    return alone.rows(cluster.load(alone, seed))


def test_a_declared_adapter_is_read_when_a_peer_asks_for_it(cluster: Cluster) -> None:
    a = cluster.node(adapters_that_fit=1)
    cluster.load(a, 1)
    a.store.registry.declare("lazy", cluster.folder(2))
    b = cluster.node(a.transport.address)
    ref = b.store.registry.resolve("lazy")
    assert a.store.registry.known("lazy") == ref
    assert b.bring(ref)
    assert torch.equal(b.rows(ref), a_copy_of(cluster, 2))


def test_a_folder_that_cannot_be_read_is_not_told(cluster: Cluster) -> None:
    a = cluster.node()
    folder = cluster.folder(1)
    a.store.registry.declare("broken", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    b = cluster.node(a.transport.address)
    with pytest.raises(UnknownAdapter, match="broken"):
        b.store.registry.resolve("broken")


def test_a_peer_is_asked_nothing_on_anothers_behalf(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    c = cluster.node(b.transport.address)
    with pytest.raises(UnknownAdapter):
        c.store.registry.resolve("a1")
    assert b.transport.asked == []


def test_a_copy_makes_room_for_another_but_not_while_it_is_read(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.peers.published_weights._ROOM_PATIENCE_S", 0.0)
    a, second = evicted(cluster, copies_that_fit=1)
    third = cluster.load(a, 3)
    b = cluster.node(a.transport.address)
    held = lease(cluster, b, a, second)
    with pytest.raises(NotOffered):
        lease(cluster, b, a, third)
    assert (a.store.stats().published.crowded, a.copies.free_pages) == (1, 0)
    cluster.run(b.transport.release(held))
    cluster.run(b.transport.release(lease(cluster, b, a, third)))
    assert a.store.stats().published.copies == 2
    a.assert_nothing_is_left()


def test_what_cannot_fit_the_copies_is_not_lent(cluster: Cluster) -> None:
    a = cluster.node(adapters_that_fit=1, copies_that_fit=1)
    cluster.load(a, 1)
    big = a.store.registry.load("big", cluster.folder(2))
    a.copies.allocate(PAGE_BYTES)
    b = cluster.node(a.transport.address)
    with pytest.raises(NotOffered):
        lease(cluster, b, a, big)
    assert a.store.stats().published.crowded == 1


def test_a_copy_gives_way_when_its_content_becomes_resident(cluster: Cluster) -> None:
    a, ref = evicted(cluster)
    b = cluster.node(a.transport.address)
    held = lease(cluster, b, a, ref)
    assert a.bring(ref)
    again = lease(cluster, b, a, ref)
    assert held.regions[0].address != again.regions[0].address, "from the pages that the steps read"
    assert a.copies.free_pages == a.copies.num_pages - PAGES_OF_RANK_4, "the copy is still read"
    for one in (held, again):
        cluster.run(b.transport.release(one))
    assert a.copies.free_pages == a.copies.num_pages
    a.assert_nothing_is_left()


def test_what_is_unloaded_is_lent_no_more(cluster: Cluster) -> None:
    a, ref = evicted(cluster)
    b = cluster.node(a.transport.address)
    cluster.run(b.transport.release(lease(cluster, b, a, ref)))
    a.store.registry.unload("a2")
    a.store.ready()
    a.store.acquire(()).release()
    with pytest.raises(NotOffered):
        lease(cluster, b, a, ref)
    assert a.copies.free_pages == a.copies.num_pages


def test_manifests_make_room_for_each_other(cluster: Cluster) -> None:
    """A thousand names are told with memory for a few manifests."""
    a = cluster.node(adapters_that_fit=1)
    ref = cluster.load(a, 1)
    for number in range(40):
        a.store.registry.load(f"alias-{number}", cluster.root / "1")
    b = cluster.node(a.transport.address)
    taken = []
    while (place := a.buffers.take(1)) is not None:
        taken.append(place)
    for _ in range(5):
        taken.pop()[1]()
    for number in range(40):
        assert b.store.registry.resolve(f"alias-{number}") == ref
    assert a.transport.memory.usage().names < 10
    for _, give_back in taken:
        give_back()
    a.assert_nothing_is_left()


def test_a_manifest_that_fits_nowhere_is_not_told(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    assert a.buffers.take(MOST_MANIFEST_BYTES) is not None
    b = cluster.node(a.transport.address)
    with pytest.raises(NotOffered):
        cluster.run(b.transport.lease(a.transport.address, manifest_name("weights", "a1"), 1.0))


class OneContent:
    """A node of one content, which is somewhere or gone."""

    def __init__(self, layout: PackedLayout, *, lost: bool = False) -> None:
        self._lost = lost
        self.fetches = 0

        self.local = LocalAdapters(lambda name: False, self._read, lambda digest: layout, self._fetch)

    def _read(self, name: str) -> None:
        raise AssertionError(name)

    def _fetch(self, digest: str, destination: torch.Tensor) -> bool:
        self.fetches += 1
        if self._lost:
            raise AdapterLost("a", "the test says so")
        return True


@pytest.fixture
def layout(cluster: Cluster) -> PackedLayout:
    node = cluster.node()
    found = node.store.contents.layout(cluster.load(node, 1).digest)
    assert found is not None
    assert found.fits(BASE)
    return found


def rows_of(cluster: Cluster, executor: HeldExecutor, copies: RankPages) -> PublishedWeights:
    """Lent rows of a node of their own."""

    async def join() -> LoopbackTransport:
        return LoopbackTransport("n", LoopbackNetwork())

    transport = cluster.run(join())
    return PublishedWeights(
        transport, PageRegions(transport, RankPages(PAGES_OF_RANK_4, PAGE_BYTES)), copies, executor
    )


def test_whoever_asks_meanwhile_shares_one_copy(cluster: Cluster, layout: PackedLayout) -> None:
    executor, copies, content = HeldExecutor(), RankPages(20, PAGE_BYTES), OneContent(layout)
    rows = rows_of(cluster, executor, copies)
    copying = [rows.publish_copy("digest", content.local) for _ in range(5)]
    assert len(executor.jobs) == 1
    assert [one for one in copying if one is not None and one.done()] == []
    executor.run()
    assert {one.done() for one in copying if one is not None} == {True}
    assert (content.fetches, rows.stats.copies) == (1, 1)


def test_a_copy_that_was_forgotten_on_its_way_is_not_lent(cluster: Cluster, layout: PackedLayout) -> None:
    executor, copies = HeldExecutor(), RankPages(20, PAGE_BYTES)
    rows = rows_of(cluster, executor, copies)
    copying = rows.publish_copy("digest", OneContent(layout).local)
    rows.forget("digest")
    executor.run()
    assert isinstance(copying, Future)
    assert copying.done()
    assert (rows.stats.copies, copies.free_pages) == (0, 20)


def test_a_copy_whose_content_became_resident_on_its_way_is_not_lent(
    cluster: Cluster, layout: PackedLayout
) -> None:
    executor, copies = HeldExecutor(), RankPages(20, PAGE_BYTES)
    rows = rows_of(cluster, executor, copies)
    rows.publish_copy("digest", OneContent(layout).local)
    rows.publish("digest", layout, PageRun(0, PAGES_OF_RANK_4))
    executor.run()
    assert (rows.stats.copies, copies.free_pages) == (0, 20)
    assert rows.withdraw("digest").done()


def test_a_content_that_is_gone_leaves_no_page_behind(cluster: Cluster, layout: PackedLayout) -> None:
    executor, copies = HeldExecutor(), RankPages(20, PAGE_BYTES)
    rows = rows_of(cluster, executor, copies)
    copying = rows.publish_copy("digest", OneContent(layout, lost=True).local)
    executor.run()
    assert copying is not None
    assert copying.done()
    assert (rows.stats.copies, copies.free_pages) == (0, 20)
