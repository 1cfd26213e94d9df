"""Move device memory over a path that ends in host memory. Bytes go through pinned buffers, piece by piece.

Where a path reaches device memory by itself (UCX with GPUDirect) nothing is staged.
"""

import queue
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from transport.base import HOST, Region
from transport.control.connection import Connection, Deadline
from transport.errors import RegionRefused
from transport.paths.base import DeviceCopy

BUFFER_BYTES = 4 << 20


class Staging:
    """Regions to a connection and from it; those of devices by `copy`, if there is one."""

    def __init__(self, copy: DeviceCopy | None) -> None:
        self._copy = copy
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def supports(self, device: int) -> bool:
        """Tell if it reaches this device's memory, or the host's."""
        return device == HOST or self._copy is not None

    def send(self, connection: Connection, region: Region, deadline: Deadline) -> None:
        """Send the region's bytes. Raises PeerGone, PullTimeout."""
        if region.device == HOST:
            connection.send_bytes(region.view(), deadline)
            return
        copy = self._device_copy(region)
        with self._buffer(copy) as buffer:
            for address, piece in _pieces(region, buffer):
                copy.to_host(region.device, address, piece)
                connection.send_bytes(piece, deadline)

    def receive(self, connection: Connection, region: Region, deadline: Deadline) -> None:
        """Fill the region. Raises PeerGone, PullTimeout."""
        if region.device == HOST:
            connection.receive_into(region.view(), deadline)
            return
        copy = self._device_copy(region)
        with self._buffer(copy) as buffer:
            for address, piece in _pieces(region, buffer):
                connection.receive_into(piece, deadline)
                copy.to_device(piece, region.device, address)

    def _device_copy(self, region: Region) -> DeviceCopy:
        if self._copy is None:
            raise RegionRefused(
                f"device {region.device}: nothing here copies to or from it; register host memory instead"
            )
        return self._copy

    @contextmanager
    def _buffer(self, copy: DeviceCopy) -> Generator[memoryview]:
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = copy.buffer(BUFFER_BYTES)
        try:
            yield buffer
        finally:
            self._free.put(buffer)


def _pieces(region: Region, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Cut the region into pieces that fit the buffer: each one's address, and the buffer's part for it."""
    for start in range(0, region.nbytes, len(buffer)):
        yield region.address + start, buffer[: min(len(buffer), region.nbytes - start)]
