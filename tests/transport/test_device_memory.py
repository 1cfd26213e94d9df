"""Device memory through the UCX path: read directly where UCX takes it, and through host memory where it does not, by
the same call. The bindings, the devices and their copies are fakes; everything between is real.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.fake_device import ARENA_BYTES, BASE, GUARD, FakeDevice
from tests.transport.fake_nixl import FakeNixl
from tests.transport.node_setup import TOKEN
from tests.transport.pattern import content
from transport.base import HOST, Memory
from transport.control.security import Security
from transport.errors import PathUnavailable, PeerGone
from transport.network import NetworkOptions, NetworkTransport
from transport.paths import nixl_agent
from transport.paths.nixl_agent import NixlAgent, Side
from transport.paths.stream import StreamPath
from transport.paths.ucx import UcxPath

THEIRS, OURS = 0, 1
OFFSET, PLACE, NBYTES = 13, 7, 8191
SOON_S = 30.0


@dataclass
class Machine:
    """Two devices, the source's and the puller's, and a NIXL that may or may not take their memory."""

    nixl: FakeNixl
    theirs: FakeDevice
    ours: FakeDevice

    def let_ucx_take(self, *devices: FakeDevice) -> None:
        """Both have peer memory, or one, or none."""
        self.nixl.devices = {device.number: device for device in devices}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = FakeNixl()
    monkeypatch.setattr(nixl_agent, "_load_bindings", lambda: fake)
    return Machine(fake, FakeDevice(content(0, ARENA_BYTES), THEIRS), FakeDevice(number=OURS))


@asynccontextmanager
async def opened(name: str, device: FakeDevice) -> AsyncGenerator[NetworkTransport]:
    """A node with both paths, as `open_paths` makes them."""
    paths = [UcxPath(name), StreamPath(device)]
    node = NetworkTransport(name, NetworkOptions(Security(TOKEN)), paths)
    yield node
    await node.close()
    assert node.memory.usage().leases == node.memory.usage().destinations == 0


async def pulled_by(machine: Machine, source_device: int, puller_device: int) -> str:
    """Pull between the two, see that the bytes are exact, and tell by which path they came."""
    async with opened("source", machine.theirs) as source, opened("puller", machine.ours) as puller:
        published = content(0, ARENA_BYTES)
        at = published.ctypes.data if source_device == HOST else BASE
        source.memory.publish(
            "adapter",
            [source.register(Memory(at, ARENA_BYTES, source_device, published)).region(OFFSET, NBYTES)],
        )
        target = np.full(ARENA_BYTES, GUARD, np.uint8) if puller_device == HOST else machine.ours.memory
        at = target.ctypes.data if puller_device == HOST else BASE
        into = puller.register(Memory(at, ARENA_BYTES, puller_device, target)).region(PLACE, NBYTES)
        await puller.fetch(source.address, "adapter", [into], SOON_S)
        np.testing.assert_array_equal(target[PLACE : PLACE + NBYTES], content(OFFSET, NBYTES))
        assert (target[:PLACE] == GUARD).all()
        assert (target[PLACE + NBYTES :] == GUARD).all()
        ((path, nbytes),) = puller.memory.usage().pulled_bytes.items()
        assert nbytes == NBYTES
        return path


ENDS = [(THEIRS, OURS), (THEIRS, HOST), (HOST, OURS)]


@pytest.mark.parametrize(("source_device", "puller_device"), ENDS)
@asynchronous
async def test_device_memory_that_ucx_takes_is_read_directly(
    machine: Machine, source_device: int, puller_device: int
) -> None:
    machine.let_ucx_take(machine.theirs, machine.ours)
    assert await pulled_by(machine, source_device, puller_device) == "ucx"
    assert machine.theirs.buffers == machine.ours.buffers == 0


@pytest.mark.parametrize(("source_device", "puller_device"), ENDS)
@asynchronous
async def test_without_peer_memory_the_same_call_stages(
    machine: Machine, source_device: int, puller_device: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await pulled_by(machine, source_device, puller_device) == "stream"
    assert (machine.theirs.buffers, machine.ours.buffers) == (source_device != HOST, puller_device != HOST)
    devices = {device for device in (source_device, puller_device) if device != HOST}
    told = [record.message for record in caplog.records]
    assert len(told) == len(devices)
    assert all(
        f"UCX cannot register device {device}: no peer memory" in line and "through host memory" in line
        for device, line in zip(sorted(devices), told, strict=True)
    )


@pytest.mark.parametrize("has", ["theirs", "ours"])
@asynchronous
async def test_peer_memory_at_one_end_is_not_enough(machine: Machine, has: str) -> None:
    machine.let_ucx_take(getattr(machine, has))
    assert await pulled_by(machine, THEIRS, OURS) == "stream"


@asynchronous
async def test_host_memory_goes_through_ucx_whatever_the_devices_lack(machine: Machine) -> None:
    assert await pulled_by(machine, HOST, HOST) == "ucx"


def test_memory_is_registered_for_its_device_and_no_other(machine: Machine) -> None:
    machine.let_ucx_take(machine.theirs, machine.ours)
    source, puller = NixlAgent("source"), NixlAgent("puller")
    source.register(Memory(BASE, ARENA_BYTES, THEIRS))
    puller.register(Memory(BASE, ARENA_BYTES, OURS))
    peer = puller.add_peer(source.metadata())
    span = [(BASE, NBYTES)]
    puller.begin(peer, Side(OURS, span), Side(THEIRS, span))
    for local, remote in [(THEIRS, THEIRS), (OURS, OURS), (HOST, THEIRS), (OURS, HOST)]:
        with pytest.raises(PeerGone, match="8191 bytes at"):
            puller.begin(peer, Side(local, span), Side(remote, span))


@asynchronous
async def test_host_memory_that_cannot_be_registered_is_an_error(machine: Machine) -> None:
    machine.nixl.takes_host = False
    async with opened("source", machine.theirs) as source:
        with pytest.raises(PathUnavailable, match="do without UCX"):
            source.register(Memory.of_buffer(bytearray(NBYTES)))
