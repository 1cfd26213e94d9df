"""DataPath: one way for bulk bytes from a source to a puller. The control connection is the same for all of them."""

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
        """What the two ends call it."""
        ...

    @property
    def cue(self) -> Sequence[Message]:
        """What to tell the source so that the bytes come; nothing where the puller reads by itself."""
        ...

    def offer(self) -> str:
        """What this node says when a puller connects, so that it can judge whether this door leads to it."""
        ...

    def reaches(self, offer: str) -> bool:
        """Whether this node can read from one that made `offer`."""
        ...

    def card(self) -> str:
        """What a puller needs, besides the regions, to read from this node now."""
        ...

    def register(self, arena: Arena) -> None:
        """Let the arena be read and written through this door, if it carries the arena's device then."""
        ...

    def carries(self, device: int) -> bool:
        """Whether memory of this device, or of the host, that was registered can be read and written through it."""
        ...

    def send(self, channel: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        """Answer the cue, at the source. PeerGone, PullTimeout, WireError."""
        ...

    def read(
        self, channel: Connection, lease: Lease, card: str, landing: Destination, deadline: Deadline
    ) -> Sequence[Message]:
        """Fill the landing, in the calling thread, when the cue has been given: what is left to be said, by and by.

        Returns only if the pages were pinned until the last byte was read. Ends the landing exactly once, when no
        byte can come any more: that may be after this has raised.
        """
        ...

    def close(self) -> None:
        """Give everything back; no landing is open."""
        ...


def usable(doors: Sequence[DataPath], offers: Mapping[str, str], setting: str) -> tuple[DataPath, ...]:
    """Those of this node's doors, in its order, that lead to a node with these offers; `setting` may name the only one.

    PathUnavailable if there is none: the stream is everybody's last resort, so that means that one was named.
    """
    leading = tuple(door for door in doors if door.name in offers and door.reaches(offers[door.name]))
    allowed = tuple(door for door in leading if setting in (AUTO, door.name))
    if not allowed:
        names = ", ".join(door.name for door in leading) or "none"
        raise PathUnavailable(
            f"door {setting!r} does not lead to this peer (these do: {names}): choose {AUTO!r}"
        )
    return allowed
