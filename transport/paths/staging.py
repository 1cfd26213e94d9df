"""Staging: device memory over a path that ends in host memory. Bytes go through pinned buffers, piece by piece.

Where a door reaches device memory by itself (UCX with GPUDirect) nothing is staged.
"""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from transport.base import HOST, Region
from transport.control.connection import Connection, Deadline
from transport.errors import RegionRefused

BUFFER_BYTES = 4 << 20


class DeviceCopy(Protocol):
    """Copies between devices and the host; a call returns when the bytes are there. Any thread may call it."""

    def buffer(self, nbytes: int) -> memoryview:
        """Host memory that the device copies to and from at full speed; kept for good."""
        ...

    def to_host(self, device: int, address: int, into: memoryview) -> None:
        """Fill `into` from the device."""
        ...

    def to_device(self, view: memoryview, device: int, address: int) -> None:
        """Write `view` to the device."""
        ...


class Staging:
    """Regions to a channel and from it; those of devices by `copy`, if there is one."""

    def __init__(self, copy: DeviceCopy | None) -> None:
        self._copy = copy
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def carries(self, device: int) -> bool:
        """Whether it reaches this device's memory, or the host's."""
        return device == HOST or self._copy is not None

    def send(self, channel: Connection, region: Region, deadline: Deadline) -> None:
        """Send the region's bytes. PeerGone, PullTimeout."""
        if region.device == HOST:
            channel.send_bytes(region.view(), deadline)
            return
        copy = self._copier(region)
        with self._buffer(copy) as buffer:
            for address, piece in _pieces(region, buffer):
                copy.to_host(region.device, address, piece)
                channel.send_bytes(piece, deadline)

    def receive(self, channel: Connection, region: Region, deadline: Deadline) -> None:
        """Fill the region. PeerGone, PullTimeout."""
        if region.device == HOST:
            channel.receive_into(region.view(), deadline)
            return
        copy = self._copier(region)
        with self._buffer(copy) as buffer:
            for address, piece in _pieces(region, buffer):
                channel.receive_into(piece, deadline)
                copy.to_device(piece, region.device, address)

    def _copier(self, region: Region) -> DeviceCopy:
        if self._copy is None:
            raise RegionRefused(
                f"device {region.device}: nothing here copies to or from it; register host memory instead"
            )
        return self._copy

    @contextmanager
    def _buffer(self, copy: DeviceCopy) -> Iterator[memoryview]:
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = copy.buffer(BUFFER_BYTES)
        try:
            yield buffer
        finally:
            self._free.put(buffer)


def _pieces(region: Region, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Address and room of each piece of the region that fits the buffer."""
    for start in range(0, region.nbytes, len(buffer)):
        yield region.address + start, buffer[: min(len(buffer), region.nbytes - start)]
