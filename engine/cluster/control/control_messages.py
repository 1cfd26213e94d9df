"""Define what members and the coordinator may say to each other, and how it looks on the wire.

Each message is MessagePack of one tagged Struct, never pickle. msgspec refuses whatever is not exactly one message
within its bounds, before anybody sees it. Reports and views are changes against what the same stream carried before:
`report_codec` and `view_codec` make and take them.
"""

from typing import Annotated, Literal, TypeVar

import msgspec

from lora.adapter import MOST_NAME_CHARS, AdapterRef, Effect
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.state import OperatingPoints
from transport.base import MOST_INT, Count

VERSION = 1
MOST_MESSAGE_BYTES = 8 << 20
"""Of one message; a view that is longer is told in parts."""
MOST_TEXT_CHARS = 1000

MemberName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_NAME_CHARS)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,64}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=MOST_TEXT_CHARS)]
FolderText = Annotated[str, msgspec.Meta(max_length=4096)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Part = Annotated[float, msgspec.Meta(gt=0, le=1)]
Rank = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
LargerThanZero = Annotated[int, msgspec.Meta(ge=1, le=MOST_INT)]
Fault = Literal["name", "exists", "invalid", "failed", "later", "unknown"]
"""Why an ask failed: an InvalidAdapterName, AdapterExists, InvalidAdapter, AdapterFailed, NotInTime, UnknownModel."""


class ControlFault(ValueError):
    """A message that means nothing where it came: the stream is closed, and its sender begins anew."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """What all messages have in common: the class's name stands first, and no field is unknown."""


class _Value(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A value inside messages."""


class WireAdapter(_Value, frozen=True):
    """An AdapterRef of an adapter, never of the base."""

    digest: Digest
    name: AdapterName
    rank: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    sites: Annotated[tuple[AdapterName, ...], msgspec.Meta(max_length=64)]
    nbytes: Count

    @classmethod
    def of(cls, ref: AdapterRef) -> "WireAdapter":
        """Turn a ref into what travels."""
        return cls(ref.digest, ref.name, ref.rank, ref.sites, ref.nbytes)

    def ref(self) -> AdapterRef:
        """Return the ref."""
        return AdapterRef(self.digest, self.name, self.rank, self.sites, self.nbytes)


class WireHardware(_Value, frozen=True):
    """A NodeHardware."""

    memory_bytes: Count
    ranks: Annotated[tuple[Rank, ...], msgspec.Meta(max_length=256)]
    tokens_per_s: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=256)]
    zone: Text

    @classmethod
    def of(cls, machine: NodeHardware) -> "WireHardware":
        """Turn a machine into what travels."""
        points = machine.operating_points
        return cls(machine.memory_bytes, points.ranks, points.tokens_per_s, machine.zone)

    def machine(self) -> NodeHardware:
        """Return the machine. Raises ControlFault for operating points that no machine has."""
        try:
            points = OperatingPoints(self.ranks, self.tokens_per_s)
        except ValueError as error:
            raise ControlFault(str(error)) from error
        return NodeHardware(self.memory_bytes, points, self.zone)


class MemberHello(_Message, frozen=True):
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


class CoordinatorHello(_Message, frozen=True):
    """First from the coordinator: it takes the member, and is of this epoch."""

    epoch: Count


class TurnedAway(_Message, frozen=True):
    """The coordinator does not take the member, and closes the stream."""

    reason: Text


class RefsChange(_Value, frozen=True):
    """How a list of refs changed, by their numbers: `gone` are taken out, `come` put at the end. Or it is all new."""

    whole: bool = False
    gone: tuple[Count, ...] = ()
    come: tuple[Count, ...] = ()


class ReportChange(_Message, frozen=True):
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
    kernel: Kernel | None
    pace: tuple[Positive, Positive, Positive]
    machine: WireHardware | None
    """None: as before."""


class RouterReportChange(_Message, frozen=True):
    """A router's RouterReport: the totals of what it refused, where they changed."""

    whole: bool
    adapters: tuple[WireAdapter, ...]
    session: Count
    table_version: Count
    refused: tuple[tuple[Count, Count], ...]


class Declares(_Message, frozen=True):
    """Names that a node has from its own options and folders, each with its digest, or "" if none was read yet.

    A name that is not here is as it was before on this stream; `gone` are declared no more.
    """

    names: dict[AdapterName, Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{0,64}\Z")]]
    gone: tuple[AdapterName, ...] = ()


class LeaveAsk(_Message, frozen=True):
    """A node asks to go, and serves on until it may."""

    session: Count


class WireEntry(_Value, frozen=True):
    """A CatalogueEntry."""

    name: AdapterName
    adapter: WireAdapter
    root: FolderText
    companions: Annotated[str, msgspec.Meta(max_length=2 << 20)]
    effect: Effect | None
    pinned: bool = False


class Ask(_Message, frozen=True):
    """Do something for the sender, and answer by the same `number`.

    A router asks to `register` or `remove` a name. The coordinator asks a node to `resolve` a name that it declares,
    to `load` a folder under a name, or to `unload` a name.
    """

    number: Count
    act: Literal["register", "remove", "resolve", "load", "unload"]
    name: AdapterName
    folder: FolderText = ""
    replaces: bool = True


class Answer(_Message, frozen=True):
    """What came of an Ask: nothing or an entry, or why it failed."""

    number: Count
    entry: WireEntry | None = None
    fault: Fault | None = None
    reason: Text = ""


class PullOrder(_Message, frozen=True):
    """A Pull."""

    session: Count
    number: LargerThanZero
    adapter: WireAdapter
    sources: tuple[MemberName, ...]


class DropOrder(_Message, frozen=True):
    """A Drop."""

    session: Count
    number: LargerThanZero
    adapter: WireAdapter


class LeaveOrder(_Message, frozen=True):
    """An AllowLeave."""

    session: Count
    number: LargerThanZero


class RejoinOrder(_Message, frozen=True):
    """A Rejoin."""

    session: Count
    next_session: Count


class WireMember(_Value, frozen=True):
    """A Member."""

    name: MemberName
    session: Count
    address: Text
    peer_address: Text
    zone: Text


class EntryChange(_Value, frozen=True):
    """A name of the catalogue that is new or means something else, with its adapter's number."""

    name: AdapterName
    adapter: Count
    root: FolderText
    companions: Annotated[str, msgspec.Meta(max_length=2 << 20)]
    effect: Effect | None
    pinned: bool


class RouteChange(_Value, frozen=True):
    """An adapter's shares, which are new or others now."""

    adapter: Count
    shares: tuple[tuple[MemberName, Part], ...]


class ViewChange(_Message, frozen=True):
    """How members, catalogue and routing table changed. A change is told in parts, of which one is the `last`.

    `whole` says that nothing before it counts.
    """

    whole: bool
    last: bool
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


FromMember = MemberHello | ReportChange | RouterReportChange | Declares | LeaveAsk | Ask | Answer
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
