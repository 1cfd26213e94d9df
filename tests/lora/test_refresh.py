"""Names that peers told follow their owners: in the background, whatever the way they came, and no longer than those
own them. A request keeps what it was accepted with."""

import threading

import pytest
import torch

from lora.adapter import AdapterRef
from lora.errors import UnknownAdapter
from lora.peers.manifest import MOST_HOPS
from lora.store.names.refresh import NameRefresher
from tests.lora.cluster import BASE, Cluster, Node
from tests.oracles.adapters import write_adapter
from transport.base import Address


def reload(cluster: Cluster, node: Node, seed: int, name: str = "a1") -> AdapterRef:
    """Let `name` mean other content at a node."""
    return node.store.registry.load(name, write_adapter(cluster.root / f"new-{seed}", BASE, 4, seed))


def test_a_reload_at_the_owner_is_followed_and_live_requests_keep_their_content(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address, adapters_that_fit=1)
    old = b.store.registry.resolve("a1")
    assert b.bring(old)
    before = b.rows(old)
    b.store.retain(old)
    new = reload(cluster, a, 7)
    assert b.store.registry.resolve("a1") == old, "until the next refresh"
    b.store.refresher.refresh()
    assert b.store.registry.resolve("a1") == new
    assert torch.equal(b.rows(old), before)
    b.store.release(old)
    assert b.bring(new)
    assert torch.equal(b.rows(new), a.rows(new))
    for node in (a, b):
        node.assert_nothing_is_left()


def test_an_unload_at_the_owner_is_followed_once_it_is_sure(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address, absent_s=0.0)
    ref = b.store.registry.resolve("a1")
    assert b.bring(ref)
    b.store.retain(ref)
    a.store.registry.unload("a1")
    b.store.refresher.refresh()
    assert b.store.registry.resolve("a1") == ref, (
        "a node that starts again needs a moment until it knows its names"
    )
    b.store.refresher.refresh()
    with pytest.raises(UnknownAdapter):
        b.store.registry.resolve("a1")
    assert ref.digest in b.store.ready(), "a live request keeps its content"
    b.store.acquire(()).release()
    b.store.release(ref)
    b.assert_nothing_is_left()


def test_an_owner_that_knows_the_name_again_in_time_loses_nothing(cluster: Cluster) -> None:
    a = cluster.node()
    ref = cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    b.store.registry.resolve("a1")
    for _ in range(3):
        a.store.registry.unload("a1")
        b.store.refresher.refresh()
        a.store.registry.load("a1", cluster.root / "1")
        b.store.refresher.refresh()
    assert b.store.registry.known("a1") == ref


def test_while_the_owner_does_not_answer_a_name_keeps_its_meaning(cluster: Cluster) -> None:
    a, c = cluster.node(), cluster.node()
    ref = cluster.load(a, 1)
    b = cluster.node(a.transport.address, c.transport.address)
    assert b.bring(b.store.registry.resolve("a1"))
    cluster.close(a)
    for _ in range(5):
        b.store.refresher.refresh()
    assert b.store.registry.resolve("a1") == ref


def test_requests_wait_for_no_refresh(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    b.store.registry.resolve("a1")
    asked = len(b.transport.asked)
    reload(cluster, a, 7)
    for _ in range(10):
        b.store.registry.resolve("a1")
        b.store.registry.known("a1")
    assert len(b.transport.asked) == asked


def test_a_reload_is_told_on_from_node_to_node(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    c = cluster.node(b.transport.address)
    for node in (b, c):
        node.store.registry.resolve("a1")
    new = reload(cluster, a, 7)
    c.store.refresher.refresh()
    assert c.store.registry.resolve("a1") != new
    for node in (b, c):
        node.store.refresher.refresh()
    assert c.store.registry.resolve("a1") == new
    for node in (b, c):
        assert node.bring(new)
        assert torch.equal(node.rows(new), a.rows(new))


def test_a_remote_name_does_not_outlive_its_owner(cluster: Cluster) -> None:
    """Two nodes that learnt a name, and would otherwise learn it from each other for ever."""
    a = cluster.node()
    cluster.load(a, 1)
    second, third = Address("loopback", 2), Address("loopback", 3)
    b = cluster.node(a.transport.address, third, absent_s=0.0)
    c = cluster.node(a.transport.address, second, absent_s=0.0)
    for node in (b, c):
        node.store.registry.resolve("a1")
    a.store.registry.unload("a1")
    rounds = 0
    while rounds < 100 and (b.store.registry.names() or c.store.registry.names()):
        rounds += 1
        for node in (b, c, b):
            node.store.refresher.refresh()
            _try(node)
    assert rounds <= 2 * MOST_HOPS
    for node in (b, c):
        with pytest.raises(UnknownAdapter):
            node.store.registry.resolve("a1")


def _try(node: Node) -> None:
    """A request, which may learn the name again from whoever still knows it."""
    try:
        node.store.registry.resolve("a1")
    except UnknownAdapter:
        return


def test_a_name_from_too_far_is_not_told(cluster: Cluster) -> None:
    nodes = [cluster.node()]
    ref = cluster.load(nodes[0], 1)
    for _ in range(MOST_HOPS):
        nodes.append(cluster.node(nodes[-1].transport.address))
        assert nodes[-1].store.registry.resolve("a1") == ref
    with pytest.raises(UnknownAdapter):
        cluster.node(nodes[-1].transport.address).store.registry.resolve("a1")


def test_of_two_owners_the_one_that_confirms_the_old_content_counts(cluster: Cluster) -> None:
    """A rolling reload: the name changes with the last owner, and does not flap."""
    a, b = cluster.node(), cluster.node()
    old = cluster.load(a, 1)
    cluster.load(b, 1)
    c = cluster.node(a.transport.address, b.transport.address)
    c.store.registry.resolve("a1")
    reload(cluster, a, 7)
    c.store.refresher.refresh()
    assert c.store.registry.known("a1") == old
    new = reload(cluster, b, 7)
    c.store.refresher.refresh()
    assert c.store.registry.known("a1") == new


def test_an_owner_is_believed_before_those_who_heard_of_it(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    b.store.registry.resolve("a1")
    new = reload(cluster, a, 7)
    c = cluster.node(b.transport.address, a.transport.address)
    assert c.store.registry.resolve("a1") == new, "b has not heard yet"


def test_a_name_that_was_loaded_here_meanwhile_is_nobody_elses(cluster: Cluster) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    b.store.registry.resolve("a1")
    mine = reload(cluster, b, 7)
    a.store.registry.unload("a1")
    for _ in range(3):
        b.store.refresher.refresh()
    assert b.store.registry.known("a1") == mine


def test_a_thread_refreshes_until_it_is_closed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a = cluster.node()
    cluster.load(a, 1)
    b = cluster.node(a.transport.address)
    b.store.registry.resolve("a1")
    new = reload(cluster, a, 7)
    updated = threading.Event()
    remote, update = b.store.registry.remote, b.store.registry.remote.update
    monkeypatch.setattr(remote, "update", lambda name, told: (update(name, told), updated.set()))
    refresher = NameRefresher(remote, b.store._tiers, b.pages.nbytes, every_s=0.001)
    assert updated.wait(30)
    refresher.close()
    assert b.store.registry.known("a1") == new
