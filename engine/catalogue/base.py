"""Define what a registry of adapters holds of each name, and what administrators may ask of it, whoever owns it.

A single server owns its own. In a cluster the coordinator does, and routers ask it.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.catalogue.alias_targets import AliasTarget, Targets
from lora.adapter import AdapterRef, Effect
from lora.format.companions import NO_COMPANIONS, Companions

MOST_COPIES = 4096
MOST_REQUESTS = 1 << 20
MOST_HELD_S = 3600.0
VERSION_CHARS = 16
"""Of a content's digest, where a version is told to clients."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A name that requests may use, and the one content that it means now.

    `root` is what the adapter was registered from, as clients are told. `pinned` is the least number of its copies, 0
    meaning as many as is thought best. `alias_of` is the name whose meaning it was given, if it is an alias. At most
    `max_requests` requests may be under way by this name, 0 meaning any number. `targets` are the names
    that answer its requests by share, if it has any; the first is `alias_of`.
    """

    name: str
    ref: AdapterRef
    root: str = ""
    companions: Companions = NO_COMPANIONS
    effect: Effect | None = None
    pinned: int = 0
    alias_of: str = ""
    max_requests: int = 0
    targets: Targets = ()


@dataclass(frozen=True, slots=True)
class EntrySettings:
    """What is asked for a name beside its meaning; None leaves what was asked before."""

    pinned: int | None = None
    max_requests: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What administrators are told of a name. `version` is the digest of its content, None before it was read.

    `tiers` says by node where the content is: `device`, `arriving`, or on a single server `host`, `disk`, `source`, or
    `folder` if it was never read.
    `shares` are the parts of its traffic by node. `in_flight` and `last_use_s` are of the server that was asked.
    `held_s` is for how long the name still takes no requests. `targets` are an alias's that has shares.
    """

    name: str
    version: str | None
    alias_of: str | None = None
    source: str = ""
    rank: int | None = None
    bytes: int | None = None
    effect: Effect | None = None
    error: str | None = None
    pinned: int = 0
    max_requests: int = 0
    copies: int = 0
    tiers: Mapping[str, str] = field(default_factory=dict[str, str])
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    in_flight: int = 0
    last_use_s: float | None = None
    held_s: float | None = None
    targets: Sequence[AliasTarget] = ()


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node: what it told the coordinator, and what the router that was asked knows of it. None is not known.

    `load` is the part of its time that the placement plans for, `slowdown` its steps' seconds over its profile's.
    """

    name: str
    state: str
    address: str = ""
    zone: str = ""
    session: int = 0
    table_version: int | None = None
    memory_bytes: int | None = None
    used_bytes: int | None = None
    load: float | None = None
    slowdown: float | None = None
    held: int | None = None
    arriving: int | None = None
    cached: int | None = None
    requests: int | None = None
    seats: int | None = None


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """A router: when it began, and by which routing table it routes."""

    name: str
    session: int
    table_version: int | None = None


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """An adapter whose shares were changed: the nodes that gained it, and those that lost it."""

    name: str
    gained: Sequence[str]
    lost: Sequence[str]


@dataclass(frozen=True, slots=True)
class ReplacementRecord:
    """One time that the placement was changed, what had happened before, and the moves of most demand."""

    age_s: float
    adapters: int
    bytes: int
    reasons: Sequence[str] = ()
    moves: Sequence[MoveRecord] = ()


@dataclass(frozen=True, slots=True)
class SizeRecord:
    """How many nodes there should be and how many serve; how long ago the number changed last, and why.

    It is chosen between `lowest` and `highest`, as whoever starts the nodes says; 0 is not known.
    """

    wanted: int
    present: int
    age_s: float
    reason: str
    lowest: int = 0
    highest: int = 0


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """What administrators are told of a cluster. While no coordinator answers, what its members remember of it.

    `epoch` is the coordinator's, None if none answers. `replacements` counts all of this epoch, `last` tells the last.
    `size` is None where the number of nodes is fixed.
    """

    epoch: int | None
    table_version: int
    adapters: int
    nodes: Sequence[NodeRecord] = ()
    routers: Sequence[RouterRecord] = ()
    replacements: int | None = None
    last_replacements: Sequence[ReplacementRecord] = ()
    size: SizeRecord | None = None


def names_after(names: Iterable[str], after: str, limit: int) -> list[str]:
    """Return the first `limit` names after `after`, in order."""
    ordered = sorted(names)
    start = bisect_right(ordered, after)
    return ordered[start : start + limit]


class ClusterRecords(Protocol):
    """What there is to tell of a cluster and its adapters. Used on one event loop."""

    async def records(self, after: str, limit: int) -> Sequence[AdapterRecord]:
        """Describe the first `limit` names after `after`, in order of names."""
        ...

    async def cluster(self) -> ClusterRecord:
        """Describe the cluster."""
        ...


class AdapterCatalogue(ClusterRecords, Protocol):
    """The registry behind one server, as administrators see it. Used on one event loop."""

    async def record(self, name: str) -> AdapterRecord:
        """Describe one name. Raises UnknownModel."""
        ...

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> None:
        """Let `name` mean, from now on and in one step, what `target` means now.

        With `targets`, of which `target` is the first, they answer its requests by share, as what they mean by then.

        Raises InvalidAdapterName, UnknownModel, AdapterFailed or NotInTime.
        """
        ...

    async def set(self, name: str, settings: EntrySettings) -> None:
        """Ask something else for a name. Raises UnknownModel, InvalidParameter, AdapterFailed or NotInTime."""
        ...

    async def hold(self, name: str, seconds: float) -> None:
        """Let a name take no requests for so long, at any door of the service. Raises UnknownModel or NotInTime."""
        ...

    async def release(self, name: str) -> None:
        """Let a name take requests again. Raises UnknownModel or NotInTime."""
        ...

    async def abort(self, name: str) -> int:
        """End the requests that run under a name, with what they have; return how many they were.

        Raises UnknownModel for a name that means nothing, and that no request runs under; or NotInTime.
        """
        ...
