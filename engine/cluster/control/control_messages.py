"""Define what members and the coordinator may say to each other, and how it looks on the wire.

Each message is MessagePack of one tagged Struct, never pickle. msgspec refuses whatever is not exactly one message
within its bounds, before anybody sees it. Reports and views are changes against what the same stream carried before:
`report_codec` and `view_codec` make and take them.
"""

from typing import Annotated, Literal, TypeVar

import msgspec

from engine.cluster.control.ask_messages import Answer, Ask, StatusAsk, StatusTold
from engine.cluster.control.control_values import (
    AdapterName,
    ControlFault,
    ControlMessage,
    EntryChange,
    LargerThanZero,
    MemberName,
    Positive,
    RefsChange,
    RouteChange,
    Text,
    WireAdapter,
    WireHardware,
    WireMember,
)
from transport.base import Count

VERSION = 6
MOST_MESSAGE_BYTES = 8 << 20
"""Of one message; a view that is longer is told in parts."""


class MemberHello(ControlMessage, frozen=True):
    """First on a stream, from a member: who it is. `start` are the milliseconds at which its process began."""

    version: Count
    name: MemberName
    kind: Literal["node", "router"]
    start: Count
    address: Text = ""
    peer_address: Text = ""
    zone: Text = ""
    weights: Text = ""
    """The digest of the base model's weights: all nodes serve the same."""
    epoch: Count = 0
    """The largest of any coordinator that the member has followed."""
    profile: Text = ""
    """The digest of the profile that it tells costs by: all members have the same."""


class CoordinatorHello(ControlMessage, frozen=True):
    """First from the coordinator: it takes the member, and is of this epoch."""

    epoch: Count


class TurnedAway(ControlMessage, frozen=True):
    """The coordinator does not take the member, and closes the stream."""

    reason: Text


class ReportChange(ControlMessage, frozen=True):
    """A node's Report. `whole` says that nothing before it counts; `adapters` are numbered on from those before."""

    whole: bool
    adapters: tuple[WireAdapter, ...]
    session: Count
    number: Count
    applied: Count
    table_version: Count
    held: RefsChange
    loading: RefsChange
    cached: RefsChange
    taken: tuple[tuple[Count, Count], ...]
    slowdown: Positive
    machine: WireHardware | None
    """None: as before."""
    base_taken: Count = 0
    """Tokens of the base model; 0 where they are as before."""


class RouterReportChange(ControlMessage, frozen=True):
    """A router's RouterReport: the totals of what it refused, where they changed."""

    whole: bool
    adapters: tuple[WireAdapter, ...]
    session: Count
    table_version: Count
    refused: tuple[tuple[Count, Count], ...]
    base_refused: Count = 0


class Declares(ControlMessage, frozen=True):
    """Names that a node has from its own options and folders, each with its digest, or "" if none was read yet.

    A name that is not here is as it was before on this stream; `gone` are declared no more.
    """

    names: dict[AdapterName, Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{0,64}\Z")]]
    gone: tuple[AdapterName, ...] = ()


class LeaveAsk(ControlMessage, frozen=True):
    """A node asks to go, and serves on until it may."""

    session: Count


class PullOrder(ControlMessage, frozen=True):
    """A Pull."""

    session: Count
    number: LargerThanZero
    adapter: WireAdapter
    sources: tuple[MemberName, ...]


class DropOrder(ControlMessage, frozen=True):
    """A Drop."""

    session: Count
    number: LargerThanZero
    adapter: WireAdapter


class LeaveOrder(ControlMessage, frozen=True):
    """An AllowLeave."""

    session: Count
    number: LargerThanZero


class RejoinOrder(ControlMessage, frozen=True):
    """A Rejoin."""

    session: Count
    next_session: Count


class ViewChange(ControlMessage, frozen=True):
    """How members, catalogue and routing table changed. A change is told in parts, of which one is the `last`.

    `whole` says that nothing before it counts. Until the coordinator is `settled` it may not know all that there is.
    """

    whole: bool
    last: bool
    settled: bool
    table_version: Count
    adapters: tuple[tuple[Count, WireAdapter], ...] = ()
    members: tuple[WireMember, ...] = ()
    entries: tuple[EntryChange, ...] = ()
    routes: tuple[RouteChange, ...] = ()
    members_gone: tuple[MemberName, ...] = ()
    entries_gone: tuple[AdapterName, ...] = ()
    adapters_gone: tuple[Count, ...] = ()
    """Numbers that neither the catalogue nor the table uses any more, and whose routes are gone with them."""
    routes_gone: tuple[Count, ...] = ()
    replacements: Count = 0
    """How often the placement was changed in the coordinator's epoch."""
    nodes_wanted: Count = 0
    """How many nodes there should be; 0 where nobody asks."""
    routers: tuple[MemberName, ...] | None = None
    """The routers that are there; None: as before."""


FromMember = MemberHello | ReportChange | RouterReportChange | Declares | LeaveAsk | Ask | StatusAsk | Answer
FromCoordinator = (
    CoordinatorHello
    | TurnedAway
    | PullOrder
    | DropOrder
    | LeaveOrder
    | RejoinOrder
    | ViewChange
    | Ask
    | Answer
    | StatusTold
)
M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()
_from_member: msgspec.msgpack.Decoder[FromMember] = msgspec.msgpack.Decoder(FromMember)
_from_coordinator: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)


def encoded(message: FromMember | FromCoordinator) -> bytes:
    """Write one message."""
    return _encoder.encode(message)


def read_from_member(frame: bytes) -> FromMember:
    """Read what a member sent. Raises ControlFault."""
    return _decoded(_from_member, frame)


def read_from_coordinator(frame: bytes) -> FromCoordinator:
    """Read what the coordinator sent. Raises ControlFault."""
    return _decoded(_from_coordinator, frame)


def _decoded(decoder: msgspec.msgpack.Decoder[M], frame: bytes) -> M:
    if len(frame) > MOST_MESSAGE_BYTES:
        raise ControlFault(f"a message of {len(frame)} bytes: at most {MOST_MESSAGE_BYTES} are taken")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ControlFault(f"no message of version {VERSION}: {error}") from error
