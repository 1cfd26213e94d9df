"""Two versions of one name under way at once: each content is learnt and pulled by its digest, so none mix."""

import asyncio
import time

import pytest
import torch

from lora.adapter import AdapterRef
from lora.errors import UnknownAdapter
from tests.lora.cluster import Cluster, Node


def test_a_version_is_learnt_by_its_digest_while_its_name_is_registered_anew_and_none_mix(
    cluster: Cluster,
) -> None:
    """The pull of the first version waits while its name comes to mean the second."""
    owner = cluster.node()
    asker = cluster.node(owner.transport.address, workers=1)
    first = owner.store.registry.load("poet", cluster.folder(1))
    owner.store.retain(first)
    expected = {first: owner.rows(first)}
    asker.store.kept.learn(first, "poet", ())
    asker.transport.go_on = cluster.run(_made_event())
    asker.store.retain(first)
    asker.store.loader.prefetch((first,))
    assert asker.transport.begun.wait(10)
    second = owner.store.registry.load("poet", cluster.folder(2))
    expected[second] = owner.rows(second)
    assert not torch.equal(*expected.values())
    cluster.run(_set(asker.transport.go_on))
    asker.store.kept.learn(second, "poet", ())
    asker.store.retain(second)
    asker.store.loader.prefetch((second, first))
    _wait_ready(asker, first, second)
    for ref, rows in expected.items():
        assert torch.equal(asker.rows(ref), rows)
    assert [name for name in asker.transport.asked if name.startswith("name/")] == []
    for node, refs in ((owner, (first,)), (asker, (first, second))):
        for ref in refs:
            node.store.release(ref)


def test_a_content_that_no_member_has_is_unknown(cluster: Cluster) -> None:
    """A member that knows other contents, even under the same name, cannot tell how this one is laid out."""
    owner = cluster.node()
    known = owner.store.registry.load("poet", cluster.folder(1))
    asker = cluster.node(owner.transport.address)
    unknown = AdapterRef("e" * 64, "poet", known.rank, known.sites, known.nbytes)
    with pytest.raises(UnknownAdapter, match="poet"):
        asker.store.kept.learn(unknown, "poet", ())


def _wait_ready(node: Node, *refs: AdapterRef) -> None:
    """Step as the engine does until all are in device memory."""
    until = time.monotonic() + 10
    while not {ref.digest for ref in refs} <= node.store.ready():
        assert time.monotonic() < until, "the contents never came"
        node.store.acquire(()).release()
        time.sleep(0.01)
    node.store.acquire(()).release()


async def _made_event() -> asyncio.Event:
    return asyncio.Event()


async def _set(event: asyncio.Event) -> None:
    event.set()
