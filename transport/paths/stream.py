"""StreamPath: bulk bytes over the control connection itself. It works wherever the two ends can talk at all."""

from collections.abc import Sequence

from transport.base import Arena, Lease, Region
from transport.control.connection import Connection, Deadline
from transport.control.messages import Bytes, Message, Read
from transport.errors import WireError
from transport.memory.destinations import Destination
from transport.paths.staging import DeviceCopy, Staging


class StreamPath:
    """Host memory to host memory, in place; a device's memory through `copy`, if there is one."""

    name = "stream"
    cue = (Read(),)

    def __init__(self, copy: DeviceCopy | None = None) -> None:
        self._staging = Staging(copy)

    def offer(self) -> str:
        """Nothing to say."""
        return ""

    def reaches(self, offer: str) -> bool:
        """Always: the connection exists."""
        return True

    def card(self) -> str:
        """Nothing is needed."""
        return ""

    def register(self, arena: Arena) -> None:
        """Nothing to do."""

    def carries(self, device: int) -> bool:
        """See `Door`."""
        return self._staging.carries(device)

    def send(self, channel: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        """See `Door`."""
        channel.send(Bytes(sum(region.nbytes for region in regions)), deadline)
        for region in regions:
            self._staging.send(channel, region, deadline)

    def read(
        self, channel: Connection, lease: Lease, card: str, landing: Destination, deadline: Deadline
    ) -> Sequence[Message]:
        """See `Door`; the landing has ended when this returns or raises."""
        try:
            coming = channel.expect(Bytes, deadline).nbytes
            if coming != lease.nbytes:
                raise WireError(f"{lease.node} sends {coming} bytes for {lease.nbytes}: compare the versions")
            for region in landing.regions:
                self._staging.receive(channel, region, deadline)
        finally:
            landing.end()
        return ()

    def close(self) -> None:
        """Nothing to give back."""
