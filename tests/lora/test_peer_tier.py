"""A store among peers: what it lacks it pulls, checks and serves; what it lends stays whole while it is read."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from lora.adapter import AdapterRef
from lora.errors import AdapterLost, AdapterUnreachable, UnknownAdapter
from lora.peers.manifest import weights_name
from tests.lora.cluster import BASE, NOBODY, PAGES_OF_RANK_4, Cluster, Node
from tests.oracles.adapters import write_adapter
from transport.base import Region
from transport.errors import NotOffered


def test_what_a_node_lacks_is_pulled_and_lent_in_turn(cluster: Cluster) -> None:
    a = cluster.node()
    b = cluster.node(a.transport.address)
    c = cluster.node(b.transport.address)
    ref = cluster.load(a, 1)
    for node in (b, c):
        found = node.store.registry.resolve("a1")
        assert (found, found.name, found.rank, found.nbytes) == (ref, "a1", 4, ref.nbytes)
        assert node.bring(found)
        assert torch.equal(node.rows(found), a.rows(ref))
        stats = node.store.stats()
        assert (stats.hits["peer"], stats.peers.pulls, stats.peers.nbytes) == (1, 1, ref.nbytes)
    for node in (a, b, c):
        node.assert_nothing_is_left()


@pytest.mark.parametrize(
    "sites", [["lm_head"], ["embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]], ids=str
)
def test_adapters_on_head_and_embedding_arrive_whole(cluster: Cluster, sites: list[str]) -> None:
    a = cluster.node()
    b = cluster.node(a.transport.address)
    ref = a.store.registry.load("ends", write_adapter(cluster.root / "ends", BASE, 4, 5, sites))
    found = b.store.registry.resolve("ends")
    assert (found.digest, set(found.sites), found.nbytes) == (ref.digest, set(sites), ref.nbytes)
    assert b.bring(found)
    assert a.bring(ref)
    assert b.store.stats().hits["peer"] == 1
    with a.store.acquire((ref,)) as ours, b.store.acquire((found,)) as theirs:
        mine, pulled = ours.weights[ref.digest].groups, theirs.weights[ref.digest].groups
        assert mine.keys() == pulled.keys()
        for key, weights in mine.items():
            assert torch.equal(pulled[key].A, weights.A)
            assert torch.equal(pulled[key].scale, weights.scale)
            for one, other in zip(weights.parts, pulled[key].parts, strict=True):
                assert torch.equal(one.Bt, other.Bt)
    for node in (a, b):
        node.assert_nothing_is_left()


def test_a_name_that_no_peer_knows_is_asked_for_once(cluster: Cluster) -> None:
    a = cluster.node()
    b = cluster.node(a.transport.address)
    for _ in range(3):
        with pytest.raises(UnknownAdapter, match="ghost"):
            b.store.registry.resolve("ghost")
    assert b.transport.asked == ["name/weights/ghost"]


def test_nodes_of_different_base_models_tell_each_other_nothing(cluster: Cluster) -> None:
    a = cluster.node(weights="some")
    b = cluster.node(a.transport.address, weights="others")
    cluster.load(a, 1)
    with pytest.raises(UnknownAdapter, match="a1"):
        b.store.registry.resolve("a1")


@pytest.mark.parametrize("name", ["../x", "a b", "", "x" * 129, "a//b", "\n"])
def test_malformed_names_reach_no_peer(cluster: Cluster, name: str) -> None:
    a = cluster.node()
    b = cluster.node(a.transport.address)
    with pytest.raises(UnknownAdapter):
        b.store.registry.resolve(name)
    assert b.transport.asked == []


def test_a_silent_peer_is_no_proof_that_a_name_is_unknown(cluster: Cluster) -> None:
    a = cluster.node()
    b = cluster.node(NOBODY, a.transport.address)
    ref = cluster.load(a, 1)
    assert b.store.registry.resolve("a1") == ref
    with pytest.raises(AdapterUnreachable, match=r"1 of 2 peers.*the log of this server"):
        b.store.registry.resolve("ghost")


def test_wrong_bytes_are_refused_counted_and_fetched_elsewhere(cluster: Cluster) -> None:
    bad, good = cluster.node(), cluster.node()
    ref = cluster.load(bad, 1)
    cluster.load(good, 1)
    bad.pages.arena[100] ^= 1
    b = cluster.node(bad.transport.address, good.transport.address)
    assert b.bring(b.store.registry.resolve("a1"))
    assert torch.equal(b.rows(ref), good.rows(ref))
    stats = b.store.stats().peers
    assert (stats.refused, stats.pulls) == (1, 2)


def test_wrong_bytes_everywhere_are_never_served(cluster: Cluster) -> None:
    a = cluster.node()
    ref = cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    found = b.store.registry.resolve("a1")
    a.pages.arena[100] ^= 1
    b.store.retain(found)
    b.store.loader.prefetch((found,))
    assert isinstance(b.store.failed()[ref.digest], AdapterLost)
    assert b.store.registry.names() == (), "the name is asked for afresh"
    b.store.release(found)
    b.assert_nothing_is_left()


def test_a_peer_that_let_go_or_died_is_passed_over_for_the_next(cluster: Cluster) -> None:
    dead, empty, holder = cluster.node(), cluster.node(), cluster.node()
    ref = cluster.load(holder, 1)
    addresses = [node.transport.address for node in (dead, empty, holder)]
    b = cluster.node(*addresses)
    found = b.store.registry.resolve("a1")
    cluster.run(dead.transport.close())
    assert b.bring(found)
    assert torch.equal(b.rows(ref), holder.rows(ref))
    stats = b.store.stats().peers
    assert (stats.failed, stats.absent, stats.pulls) == (1, 1, 1)


def test_what_was_pulled_outlives_its_source_and_its_pages(cluster: Cluster) -> None:
    a = cluster.node()
    first, second = cluster.load(a, 1), cluster.load(a, 2)
    b = cluster.node(a.transport.address, adapters_that_fit=1)
    before = None
    for name in ("a1", "a2"):
        ref = b.store.registry.resolve(name)
        assert b.bring(ref)
        before = b.rows(ref) if before is None else before
    b.rows(second)
    cluster.run(a.transport.close())
    assert b.bring(first), "displaced by a2, and its source is dead"
    assert before is not None
    assert torch.equal(b.rows(first), before)
    assert b.bring(second)
    assert b.store.stats().hits["host"] == 2


def test_without_any_peer_the_folder_is_read_again(cluster: Cluster) -> None:
    a = cluster.node()
    b = cluster.node(a.transport.address, adapters_that_fit=1)
    ref = cluster.load(b, 1)
    other = cluster.load(b, 2)
    assert b.bring(other)
    cluster.run(a.transport.close())
    b.store._tiers._packed._rows.clear()  # pyright: ignore  (host memory was trimmed)
    assert b.bring(ref)
    stats = b.store.stats()
    assert (stats.hits["source"], stats.fallbacks["host"], stats.fallbacks["peer"]) == (1, 1, 1)


def test_many_who_miss_the_same_adapter_share_one_pull(cluster: Cluster) -> None:
    a = cluster.node()
    ref = cluster.load(a, 1)
    b = cluster.node(a.transport.address, workers=4)
    arrived = threading.Event()
    b.store.loader.on_ready(arrived.set)

    def ask() -> AdapterRef:
        found = b.store.registry.resolve("a1")
        b.store.retain(found)
        b.store.loader.prefetch((found,))
        return found

    with ThreadPoolExecutor(8) as threads:
        found = [one.result() for one in [threads.submit(ask) for _ in range(16)]]
    assert set(found) == {ref}
    assert arrived.wait(30)
    assert ref.digest in b.store.ready()
    assert b.transport.pulled.count(weights_name(ref.digest)) == 1
    b.store.close()


def test_a_source_that_evicts_during_a_pull_keeps_the_pages_until_it_ends(cluster: Cluster) -> None:
    a = cluster.node(adapters_that_fit=1)
    ref = cluster.load(a, 1)
    before = a.rows(ref)
    b = cluster.node(a.transport.address, workers=2)
    arrived = threading.Event()
    b.store.loader.on_ready(arrived.set)
    found = b.store.registry.resolve("a1")
    b.transport.go_on = asyncio.Event()
    b.store.retain(found)
    b.store.loader.prefetch((found,))
    assert b.transport.begun.wait(30)
    assert b.store.ready() == frozenset(), "steps go on while bytes come"
    b.store.acquire(()).release()
    freed = threading.Event()
    a.store.acquire(()).release()
    a.store.loader.on_ready(freed.set)
    other = cluster.load(a, 2)
    a.store.loader.prefetch((other,))
    assert a.store.ready() == frozenset(), "evicted, but its pages are still read"
    a.store.acquire(()).release()
    cluster.run(_set(b.transport.go_on))
    assert arrived.wait(30)
    assert torch.equal(b.rows(ref), before)
    assert freed.wait(30), "the waiting adapter got the pages without being asked for again"
    assert a.store.ready() == {other.digest}
    b.store.close()


async def _set(event: asyncio.Event) -> None:
    event.set()


def test_pages_into_which_bytes_may_come_are_nobodys(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.peers.peer_tier._SETTLING_S", 0.0)
    a = cluster.node()
    ref = cluster.load(a, 1)
    b = cluster.node(a.transport.address, adapters_that_fit=2)
    found = b.store.registry.resolve("a1")
    settles: Future[None] = Future()
    b.transport.under_way.append(settles)
    assert b.bring(found), "pulled again, into other pages"
    assert torch.equal(b.rows(ref), a.rows(ref))
    (quarantined,) = b.transport.unsettled
    b.store.registry.unload("a1")
    b.store.ready()
    b.store.acquire(()).release()
    assert b.store.stats().free_pages == b.pages.num_pages - PAGES_OF_RANK_4
    third = cluster.load(b, 3)
    assert b.bring(third)
    assert not quarantined.overlaps(_region(b, third))
    settles.set_result(None)
    b.transport.unsettled.clear()
    b.assert_nothing_is_left()


def _region(node: Node, ref: AdapterRef) -> Region:
    content = node.store.contents._residency.find(ref.digest)
    assert content is not None
    assert content.run is not None
    return node.shared.region(content.run, ref.nbytes)


def test_a_recalled_content_is_not_offered_any_more(cluster: Cluster) -> None:
    a = cluster.node()
    ref = cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    a.store.registry.unload("a1")
    a.store.ready()
    with pytest.raises(NotOffered):
        cluster.run(b.transport.lease(a.transport.address, weights_name(ref.digest), 1.0))


def test_a_name_that_is_bound_anew_is_told_as_it_is_now(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    second = a.store.registry.load("a1", write_adapter(cluster.root / "other", BASE, 4, seed=9))
    b = cluster.node(a.transport.address)
    assert b.store.registry.resolve("a1") == second
    assert b.bring(second)
