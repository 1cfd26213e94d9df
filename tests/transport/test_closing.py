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
from tests.transport.setup import TOKEN, Setup
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


class EndlessDoor:
    """A read that is given up goes on until told to end."""

    name = "endless"
    cue: tuple[Message, ...] = ()

    def __init__(self) -> None:
        self.abandoned: list[Destination] = []
        self.closed = threading.Event()

    def offer(self) -> str:
        return ""

    def reaches(self, offer: str) -> bool:
        return True

    def card(self) -> str:
        return ""

    def register(self, arena: Arena) -> None:
        assert arena.memory.device == -1

    def carries(self, device: int) -> bool:
        return device == -1

    def send(self, channel: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        raise AssertionError("not asked for")

    def read(
        self, channel: Connection, lease: Lease, card: str, landing: Destination, deadline: Deadline
    ) -> tuple[Message, ...]:
        landing.quarantine()
        self.abandoned.append(landing)
        raise PullTimeout(f"{channel.peer}: given up")

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PARTING_S", 0.05)


def open_node(name: str, door: EndlessDoor) -> NetworkTransport:
    return NetworkTransport(name, NetworkOptions(Security(TOKEN)), [door])


@pytest.mark.usefixtures("hurried")
@asynchronous
async def test_memory_that_may_still_be_written_outlives_its_transport(
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs, ours = EndlessDoor(), EndlessDoor()
    source, puller = open_node("source", theirs), open_node("puller", ours)
    source.publish("adapter", [source.register(Memory.of_buffer(bytearray(NBYTES))).region(0, NBYTES)])
    room = np.zeros(NBYTES, np.uint8)
    alive = weakref.ref(room)
    into = puller.register(Memory(room.ctypes.data, NBYTES, owner=room)).region(0, NBYTES)
    with pytest.raises(PullTimeout):
        await puller.fetch(source.address, "adapter", [into], SOON_S)
    del room, into
    with caplog.at_level(logging.WARNING):
        await puller.close()
    assert [
        record.message for record in caplog.records if "1 abandoned pulls may still land" in record.message
    ]
    assert len(caplog.records) == 1
    del puller
    gc.collect()
    assert alive() is not None
    assert not ours.closed.is_set(), "a door must not be closed while a read of it goes on"
    ours.abandoned.pop().end()
    assert ours.closed.wait(SOON_S)
    gc.collect()
    assert alive() is None
    await source.close()
    assert theirs.closed.is_set()


@asynchronous
async def test_closing_ends_what_waits_for_a_source_that_brings_nothing() -> None:
    source, puller = Setup().open("source"), Setup().open("puller")
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def bring(name: str) -> Future[None]:
        loop.call_soon_threadsafe(asked.set)
        return Future()

    source.lend_on_demand(bring)
    leasing = asyncio.ensure_future(puller.lease(source.address, "never", 3600.0))
    await asyncio.wait_for(asked.wait(), SOON_S)
    await asyncio.wait_for(source.close(), SOON_S)
    with pytest.raises((PeerGone, NotOffered)):
        await leasing
    await puller.close()


@asynchronous
async def test_closing_ends_what_waits_for_a_silent_source() -> None:
    source, puller = Setup().open("source"), Setup().open("puller")
    source.lend_on_demand(lambda name: Future())
    leasing = asyncio.ensure_future(puller.lease(source.address, "never", 3600.0))
    for _ in range(5):
        await asyncio.sleep(0)
    await asyncio.wait_for(puller.close(), SOON_S)
    with pytest.raises((PeerGone, TransportClosed)):
        await leasing
    await asyncio.wait_for(source.close(), SOON_S)
    assert source.usage().leases == 0
