"""Define the values inside control messages, with the bounds of each field."""

from typing import Annotated

import msgspec

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import MOST_COPIES, CatalogueEntry
from lora.activation import MOST_INVOCATION_TOKENS
from lora.adapter import MOST_NAME_CHARS, AdapterRef, Effect
from lora.format.adapter_files import Flaw
from lora.format.companions import Companions, parse_companions, write_companions
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.state import OperatingPoints
from transport.base import MOST_INT, Count

MOST_TEXT_CHARS = 1000

MemberName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_NAME_CHARS)]
OptionalName = Annotated[str, msgspec.Meta(max_length=MOST_NAME_CHARS)]
Copies = Annotated[int, msgspec.Meta(ge=0, le=MOST_COPIES)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,64}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=MOST_TEXT_CHARS)]
MOST_FOLDER_CHARS = 4096
FolderText = Annotated[str, msgspec.Meta(max_length=MOST_FOLDER_CHARS)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Part = Annotated[float, msgspec.Meta(gt=0, le=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Rank = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
LargerThanZero = Annotated[int, msgspec.Meta(ge=1, le=MOST_INT)]
CompanionsText = Annotated[str, msgspec.Meta(max_length=2 << 20)]


class ControlFault(ValueError):
    """A message that means nothing where it came: the stream is closed, and its sender begins anew."""


class _Value(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A value inside messages."""


class ControlMessage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """What all messages have in common: the class's name stands first, and no field is unknown."""


class WireAdapter(_Value, frozen=True):
    """An AdapterRef of an adapter, never of the base."""

    digest: Digest
    name: AdapterName
    rank: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    sites: Annotated[tuple[AdapterName, ...], msgspec.Meta(max_length=64)]
    nbytes: Count
    invocation: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MOST_INVOCATION_TOKENS)] = ()

    @classmethod
    def of(cls, ref: AdapterRef) -> "WireAdapter":
        """Turn a ref into what travels."""
        return cls(ref.digest, ref.name, ref.rank, ref.sites, ref.nbytes, ref.invocation)

    def ref(self) -> AdapterRef:
        """Return the ref."""
        return AdapterRef(self.digest, self.name, self.rank, self.sites, self.nbytes, self.invocation)


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


class RefsChange(_Value, frozen=True):
    """How a list of refs changed, by their numbers: `gone` are taken out, `come` put at the end. Or it is all new."""

    whole: bool = False
    gone: tuple[Count, ...] = ()
    come: tuple[Count, ...] = ()


class WireEntry(_Value, frozen=True):
    """A CatalogueEntry."""

    name: AdapterName
    adapter: WireAdapter
    root: FolderText
    companions: CompanionsText
    effect: Effect | None
    pinned: Copies = 0
    alias_of: OptionalName = ""
    max_requests: Count = 0
    targets: Targets = ()

    @classmethod
    def of(cls, entry: CatalogueEntry) -> "WireEntry":
        """Turn an entry into what travels."""
        asked = (entry.pinned, entry.alias_of, entry.max_requests, entry.targets)
        companions = write_companions(entry.companions)
        return cls(entry.name, WireAdapter.of(entry.ref), entry.root, companions, entry.effect, *asked)

    def entry(self) -> CatalogueEntry:
        """Return the entry. Raises ControlFault for companions that are damaged."""
        asked = (self.pinned, self.alias_of, self.max_requests, self.targets)
        companions = companions_of(self.name, self.companions)
        return CatalogueEntry(self.name, self.adapter.ref(), self.root, companions, self.effect, *asked)


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
    companions: CompanionsText
    effect: Effect | None
    pinned: Copies
    alias_of: OptionalName
    max_requests: Count
    targets: Targets = ()


class RouteChange(_Value, frozen=True):
    """An adapter's shares, which are new or others now."""

    adapter: Count
    shares: tuple[tuple[MemberName, Part], ...]


def companions_of(name: str, text: str) -> Companions:
    """Read an adapter's companions. Raises ControlFault."""
    try:
        return parse_companions(text)
    except Flaw as flaw:
        raise ControlFault(f"the entry of {name}: {flaw}") from flaw
