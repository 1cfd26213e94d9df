"""Send bulk bytes over the control connection itself. It works wherever the two ends can talk at all."""

from collections.abc import Sequence

from transport.base import Arena, Lease, Region
from transport.control.connection import Connection, Deadline
from transport.control.messages import Bytes, Message, Read
from transport.errors import WireError
from transport.memory.destinations import Destination
from transport.paths.base import DeviceCopy
from transport.paths.staging import Staging


class StreamPath:
    """Host memory to host memory, in place; a device's memory through `copy`, if there is one."""

    name = "stream"
    start_messages = (Read(),)

    def __init__(self, copy: DeviceCopy | None = None) -> None:
        self._staging = Staging(copy)

    def capabilities(self) -> str:
        """Return nothing: all streams are alike."""
        return ""

    def reaches(self, capabilities: str) -> bool:
        """Return True: the connection exists."""
        return True

    def metadata(self) -> str:
        """Return nothing: the source finds the bytes by itself."""
        return ""

    def register(self, arena: Arena) -> None:
        """Do nothing: any memory can be sent."""

    def supports(self, device: int) -> bool:
        """Tell if the device's memory is sent in place or can be copied."""
        return self._staging.supports(device)

    def send(self, connection: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        """Send how many bytes follow, then the bytes."""
        connection.send(Bytes(sum(region.nbytes for region in regions)), deadline)
        for region in regions:
            self._staging.send(connection, region, deadline)

    def read(
        self,
        connection: Connection,
        lease: Lease,
        metadata: str,
        destination: Destination,
        deadline: Deadline,
    ) -> Sequence[Message]:
        """Receive the bytes; the destination has ended when this returns or raises."""
        try:
            coming = connection.expect(Bytes, deadline).nbytes
            if coming != lease.nbytes:
                raise WireError(f"{lease.node} sends {coming} bytes for {lease.nbytes}: compare the versions")
            for region in destination.regions:
                self._staging.receive(connection, region, deadline)
        finally:
            destination.end()
        return ()

    def close(self) -> None:
        """Do nothing: the connection is the transport's."""
