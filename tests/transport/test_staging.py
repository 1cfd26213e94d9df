"""Device memory over host memory: bytes go through buffers exactly, and past them where a path takes the memory."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.fake_device import ARENA_BYTES, BASE, GUARD, FakeDevice
from tests.transport.node_setup import TOKEN
from tests.transport.pattern import content
from transport.base import Arena, Lease, Memory, Region
from transport.control.connection import Connection, Deadline
from transport.control.messages import Message
from transport.control.security import Security
from transport.errors import PathUnavailable, RegionRefused
from transport.memory.destinations import Destination
from transport.network import NetworkOptions, NetworkTransport
from transport.paths import staging
from transport.paths.base import DataPath
from transport.paths.stream import StreamPath

SOON_S = 30.0


class DirectPath:
    """Stands for UCX: supports `devices`, and counts instead of reading when it is used."""

    name = "direct"
    start_messages: tuple[Message, ...] = ()

    def __init__(self, *devices: int) -> None:
        self._devices = {-1, *devices}
        self.read_from: list[int] = []

    def capabilities(self) -> str:
        return ""

    def reaches(self, capabilities: str) -> bool:
        return True

    def metadata(self) -> str:
        return ""

    def register(self, arena: Arena) -> None:
        assert arena.memory.nbytes > 0

    def supports(self, device: int) -> bool:
        return device in self._devices

    def send(self, connection: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        raise AssertionError("it is read from, it does not send")

    def read(
        self,
        connection: Connection,
        lease: Lease,
        metadata: str,
        destination: Destination,
        deadline: Deadline,
    ) -> tuple[Message, ...]:
        self.read_from += [region.device for region in lease.regions]
        destination.end()
        return ()

    def close(self) -> None:
        self.read_from.clear()


def open_node(name: str, *paths: DataPath) -> NetworkTransport:
    return NetworkTransport(name, NetworkOptions(Security(TOKEN)), paths)


def publish(node: NetworkTransport, device: int, offset: int, nbytes: int) -> None:
    """Publish the pattern from `offset` on, from host memory or from where a device has it."""
    owner = content(0, ARENA_BYTES)
    memory = Memory(owner.ctypes.data if device < 0 else BASE, ARENA_BYTES, device, owner)
    node.memory.publish("adapter", [node.register(memory).region(offset, nbytes)])


@pytest.mark.parametrize("nbytes", [1, 64, 65, 8191])
@pytest.mark.parametrize(("source_device", "puller_device"), [(-1, 0), (0, -1), (0, 0)])
@asynchronous
async def test_device_memory_is_staged_exactly(
    source_device: int, puller_device: int, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", 64)
    theirs, ours = FakeDevice(content(0, ARENA_BYTES)), FakeDevice()
    source, puller = open_node("source", StreamPath(theirs)), open_node("puller", StreamPath(ours))
    publish(source, source_device, 13, nbytes)
    target = np.full(ARENA_BYTES, GUARD, np.uint8) if puller_device < 0 else ours.memory
    address = target.ctypes.data if puller_device < 0 else BASE
    arena = puller.register(Memory(address, ARENA_BYTES, puller_device, target))
    for _ in range(2):
        target[:] = GUARD
        await puller.fetch(source.address, "adapter", [arena.region(7, nbytes)], SOON_S)
        np.testing.assert_array_equal(target[7 : 7 + nbytes], content(13, nbytes))
        assert (target[:7] == GUARD).all()
        assert (target[7 + nbytes :] == GUARD).all()
    assert (theirs.buffers, ours.buffers) == (source_device + 1, puller_device + 1), "a buffer is used again"
    await puller.close()
    await source.close()
    assert source.memory.usage().leases == puller.memory.usage().destinations == 0


@pytest.mark.parametrize(
    ("at_source", "at_puller", "source_device", "puller_device", "taken"),
    [
        ((0,), (0,), 0, 0, "direct"),
        ((0,), (), 0, -1, "direct"),
        ((), (0,), 0, -1, "stream"),
        ((0,), (), -1, 0, "stream"),
        ((), (), 0, 0, "stream"),
        ((), (), -1, -1, "direct"),
    ],
)
@asynchronous
async def test_the_direct_path_is_taken_where_it_supports_both_ends(
    at_source: tuple[int, ...],
    at_puller: tuple[int, ...],
    source_device: int,
    puller_device: int,
    taken: str,
) -> None:
    theirs, ours = DirectPath(*at_source), DirectPath(*at_puller)
    source = open_node("source", theirs, StreamPath(FakeDevice(content(0, ARENA_BYTES))))
    puller = open_node("puller", ours, StreamPath(FakeDevice()))
    publish(source, source_device, 0, 100)
    target = np.full(ARENA_BYTES, GUARD, np.uint8)
    address = target.ctypes.data if puller_device < 0 else BASE
    into = puller.register(Memory(address, ARENA_BYTES, puller_device, target)).region(0, 100)
    await puller.fetch(source.address, "adapter", [into], SOON_S)
    assert puller.memory.usage().pulled_bytes == {taken: 100}
    assert ours.read_from == ([source_device] if taken == "direct" else [])
    await puller.close()
    await source.close()
    assert source.memory.usage().leases == puller.memory.usage().destinations == 0


@asynchronous
async def test_memory_that_no_path_supports_is_refused_when_it_is_registered() -> None:
    lonely = open_node("lonely", StreamPath())
    with pytest.raises(RegionRefused, match="no path supports"):
        lonely.register(Memory(BASE, ARENA_BYTES, device=0))
    await lonely.close()


@asynchronous
async def test_a_device_that_only_the_source_has_ends_by_name() -> None:
    source = open_node("source", DirectPath(0))
    puller = open_node("puller", DirectPath(), StreamPath(FakeDevice()))
    publish(source, -1, 0, 100)
    into = puller.register(Memory(BASE, ARENA_BYTES, device=0)).region(0, 100)
    with pytest.raises(PathUnavailable, match="supports devices"):
        await puller.fetch(source.address, "adapter", [into], SOON_S)
    await puller.close()
    await source.close()
    assert source.memory.usage().leases == puller.memory.usage().destinations == 0


@asynchronous
async def test_a_lease_by_a_path_that_does_not_support_the_destination_is_refused_and_ends() -> None:
    source = open_node("source", DirectPath(), StreamPath(FakeDevice()))
    puller = open_node("puller", DirectPath(), StreamPath(FakeDevice()))
    publish(source, -1, 0, 100)
    into = puller.register(Memory(BASE, ARENA_BYTES, device=0)).region(0, 100)
    lease = await puller.lease(source.address, "adapter", SOON_S)
    with pytest.raises(RegionRefused, match="does not support"):
        await puller.pull(lease, [into], SOON_S)
    await puller.close()
    await source.close()
    assert source.memory.usage().leases == puller.memory.usage().destinations == 0
