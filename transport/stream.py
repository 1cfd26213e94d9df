"""StreamDoor: bulk bytes over the control connection itself. It works wherever the two ends can talk at all."""

from collections.abc import Sequence

from transport.base import Arena, Lease
from transport.channel import Channel
from transport.deadline import Deadline
from transport.errors import WireError
from transport.landings import Landing
from transport.wire import Bytes, Message, Read


class StreamDoor:
    """Host memory to host memory, received in place."""

    name = "stream"
    cue = (Read(),)

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

    def read(
        self, channel: Channel, lease: Lease, card: str, landing: Landing, deadline: Deadline
    ) -> Sequence[Message]:
        """See `Door`; the landing has ended when this returns or raises."""
        try:
            views = [region.view() for region in landing.regions]
            coming = channel.expect(Bytes, deadline).nbytes
            if coming != lease.nbytes:
                raise WireError(f"{lease.node} sends {coming} bytes for {lease.nbytes}: compare the versions")
            for view in views:
                channel.receive_into(view, deadline)
        finally:
            landing.end()
        return ()

    def close(self) -> None:
        """Nothing to give back."""
