"""Declare what a data path is: one way for bulk bytes from a source to a puller.

The control connection is the same for all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from transport.base import Arena, Lease, Region
from transport.control.connection import Connection, Deadline
from transport.control.messages import Message
from transport.errors import PathUnavailable
from transport.memory.destinations import Destination

AUTO = "auto"


class DataPath(Protocol):
    """Both ends of a data path: what a source says of itself, and how a puller reads."""

    @property
    def name(self) -> str:
        """Return what the two ends call it."""
        ...

    @property
    def start_messages(self) -> Sequence[Message]:
        """Return what to tell the source so that the bytes come; nothing where the puller reads by itself."""
        ...

    def capabilities(self) -> str:
        """Return what this node says when a puller connects, so that it can judge whether the path leads here."""
        ...

    def reaches(self, capabilities: str) -> bool:
        """Tell if this node can read from one with these capabilities."""
        ...

    def metadata(self) -> str:
        """Return what a puller needs, besides the regions, to read from this node now."""
        ...

    def register(self, arena: Arena) -> None:
        """Let the arena be read and written by this path, if it supports the arena's device then."""
        ...

    def supports(self, device: int) -> bool:
        """Tell if registered memory of this device, or of the host, can be read and written by this path."""
        ...

    def send(self, connection: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        """Answer the start messages, at the source. Raises PeerGone, PullTimeout, WireError."""
        ...

    def read(
        self,
        connection: Connection,
        lease: Lease,
        metadata: str,
        destination: Destination,
        deadline: Deadline,
    ) -> Sequence[Message]:
        """Fill the destination, in the calling thread, and return what is left to be said to the source later.

        The start messages have been sent. Returns only if the pages were pinned until the last byte was read. Ends
        the destination exactly once, when no byte can come any more: that may be after this has raised.
        """
        ...

    def close(self) -> None:
        """Give everything back; no destination is open."""
        ...


class DeviceCopy(Protocol):
    """Copies between devices and the host; a call returns when the bytes are there. Any thread may call it."""

    def buffer(self, nbytes: int) -> memoryview:
        """Return host memory that the device copies to and from at full speed; kept for good."""
        ...

    def to_host(self, device: int, address: int, into: memoryview) -> None:
        """Fill `into` from the device."""
        ...

    def to_device(self, view: memoryview, device: int, address: int) -> None:
        """Write `view` to the device."""
        ...


def usable(paths: Sequence[DataPath], capabilities: Mapping[str, str], setting: str) -> tuple[DataPath, ...]:
    """Select those of this node's paths, in its order, that lead to a node with these capabilities.

    `setting` may name the only one allowed. Raises PathUnavailable if there is none: the stream is everybody's last
    resort, so that means that one was named.
    """
    leading = tuple(
        path for path in paths if path.name in capabilities and path.reaches(capabilities[path.name])
    )
    allowed = tuple(path for path in leading if setting in (AUTO, path.name))
    if not allowed:
        names = ", ".join(path.name for path in leading) or "none"
        raise PathUnavailable(
            f"path {setting!r} does not lead to this peer (these do: {names}): choose {AUTO!r}"
        )
    return allowed
