"""Closing ends in bounded time, whatever goes on; memory that is still being written outlives it."""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.node_setup import TOKEN, Setup
from transport import network
from transport.base import Arena, Lease, Memory, Region
from transport.control.connection import Connection, Deadline
from transport.control.messages import Message
from transport.control.security import Security
from transport.errors import NotOffered, PeerGone, PullTimeout, TransportClosed
from transport.memory.destinations import Destination
from transport.network import NetworkOptions, NetworkTransport

NBYTES = 64
SOON_S = 30.0


class EndlessPath:
    """A read that is given up goes on until told to end."""

    name = "endless"
    start_messages: tuple[Message, ...] = ()

    def __init__(self) -> None:
        self.abandoned: list[Destination] = []
        self.closed = threading.Event()

    def capabilities(self) -> str:
        return ""

    def reaches(self, capabilities: str) -> bool:
        return True

    def metadata(self) -> str:
        return ""

    def register(self, arena: Arena) -> None:
        assert arena.memory.device == -1

    def supports(self, device: int) -> bool:
        return device == -1

    def send(self, connection: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        raise AssertionError("not asked for")

    def read(
        self,
        connection: Connection,
        lease: Lease,
        metadata: str,
        destination: Destination,
        deadline: Deadline,
    ) -> tuple[Message, ...]:
        destination.quarantine()
        self.abandoned.append(destination)
        raise PullTimeout(f"{connection.peer}: given up")

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "SETTLE_S", 0.05)


def open_node(name: str, path: EndlessPath) -> NetworkTransport:
    return NetworkTransport(name, NetworkOptions(Security(TOKEN)), [path])


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
@asynchronous
async def test_memory_that_may_still_be_written_outlives_its_transport(
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs, ours = EndlessPath(), EndlessPath()
    source, puller = open_node("source", theirs), open_node("puller", ours)
    source.memory.publish("adapter", [source.register(Memory.of_buffer(bytearray(NBYTES))).region(0, NBYTES)])
    target = np.zeros(NBYTES, np.uint8)
    alive = weakref.ref(target)
    into = puller.register(Memory(target.ctypes.data, NBYTES, owner=target)).region(0, NBYTES)
    with pytest.raises(PullTimeout):
        await puller.fetch(source.address, "adapter", [into], SOON_S)
    del target, into
    with caplog.at_level(logging.WARNING):
        await puller.close()
    assert [
        record.message for record in caplog.records if "1 abandoned pulls may still land" in record.message
    ]
    assert len(caplog.records) == 1
    del puller
    gc.collect()
    assert alive() is not None
    assert not ours.closed.is_set(), "a path must not be closed while a read of it goes on"
    ours.abandoned.pop().end()
    assert ours.closed.wait(SOON_S)
    gc.collect()
    assert alive() is None
    await source.close()
    assert theirs.closed.is_set()


@asynchronous
async def test_closing_ends_what_waits_for_a_source_that_publishes_nothing() -> None:
    source, puller = Setup().open("source"), Setup().open("puller")
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def publish(name: str) -> Future[None]:
        loop.call_soon_threadsafe(asked.set)
        return Future()

    source.memory.publish_on_demand(publish)
    leasing = asyncio.ensure_future(puller.lease(source.address, "never", 3600.0))
    await asyncio.wait_for(asked.wait(), SOON_S)
    await asyncio.wait_for(source.close(), SOON_S)
    with pytest.raises((PeerGone, NotOffered)):
        await leasing
    await puller.close()


@asynchronous
async def test_closing_ends_what_waits_for_a_silent_source() -> None:
    source, puller = Setup().open("source"), Setup().open("puller")
    source.memory.publish_on_demand(lambda name: Future())
    leasing = asyncio.ensure_future(puller.lease(source.address, "never", 3600.0))
    for _ in range(5):
        await asyncio.sleep(0)
    await asyncio.wait_for(puller.close(), SOON_S)
    with pytest.raises((PeerGone, TransportClosed)):
        await leasing
    await asyncio.wait_for(source.close(), SOON_S)
    assert source.memory.usage().leases == 0
