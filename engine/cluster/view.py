"""Hold what a router or a node knows of its cluster: who is in it, what adapters there are, and who serves which.

The values come from the coordinator, over the control stream. They stay in force while no coordinator answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import AdapterRecord, CatalogueEntry, ClusterRecord, EntrySettings
from lora.adapter import AdapterRef
from lora.sources.source_url import AdapterSource, SourceUrl, is_url
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable


@dataclass(frozen=True, slots=True)
class Member:
    """A node that is in the cluster: where routers reach it, and where peers pull adapters from it.

    `session` grows whenever the node starts anew. `peer_address` is None where it publishes nothing.
    """

    name: str
    session: int
    address: str
    peer_address: str | None = None
    zone: str = ""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the nodes serve, as far as a router must know it; `weights` is the digest of the base model's."""

    max_model_len: int
    vocab_size: int
    weights: str


@dataclass(slots=True)
class ClusterView:
    """The latest of each value. The event loop owns it; each value is replaced whole, or by a new mapping.

    It is `known` once a coordinator has told all of it: before, a name that is not in the catalogue may be known to it.

    `changed` are called, on the event loop, after any of them was replaced.
    """

    members: Mapping[str, Member] = field(default_factory=dict[str, Member])
    catalogue: Mapping[str, CatalogueEntry] = field(default_factory=dict[str, CatalogueEntry])
    table: RoutingTable = EMPTY_TABLE
    known: bool = False
    replacements: int = 0  # of the placement, in the coordinator's epoch
    nodes_wanted: int = 0  # 0: their number is fixed
    routers: tuple[str, ...] = ()
    changed: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    def source_of(self, ref: AdapterRef) -> SourceUrl | None:
        """Return the URL that some name of a content was registered from, if one was."""
        named = self.catalogue.get(ref.name)
        for entry in (*((named,) if named is not None else ()), *self.catalogue.values()):
            if entry.ref == ref and is_url(entry.root):
                return SourceUrl.parse(entry.root)
        return None

    def tell(self) -> None:
        """Call whoever wants to know of changes."""
        for each in tuple(self.changed):
            each()


class AdapterAdministration(Protocol):
    """Whoever changes the cluster's catalogue on a client's behalf."""

    async def register(self, name: str, folder: AdapterSource, replaces: bool) -> CatalogueEntry:
        """Have a node read, check and try a PEFT folder or a URL, then let `name` mean it everywhere.

        Raises InvalidAdapterName, AdapterExists, InvalidAdapter, AdapterFailed, or NotInTime without a coordinator.
        """
        ...

    async def remove(self, name: str) -> None:
        """Let `name` mean nothing any more. Raises UnknownModel, or NotInTime without a coordinator, as the rest."""
        ...

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> CatalogueEntry:
        """Let `name` mean what `target` means now, or its requests be answered by `targets` by share.

        Raises InvalidAdapterName, UnknownModel.
        """
        ...

    async def set(self, name: str, settings: EntrySettings) -> None:
        """Ask something else for a name. Raises UnknownModel."""
        ...

    async def hold(self, name: str, seconds: float) -> None:
        """Let a name take no requests at any router for so long; 0 releases it. Raises UnknownModel or NotInTime."""
        ...

    async def abort(self, name: str) -> int:
        """End all requests under a name, at every router; return how many they were. Raises as `hold`."""
        ...

    async def cluster(self) -> ClusterRecord:
        """Describe the cluster as the coordinator knows it."""
        ...

    async def adapters(self, after: str, limit: int) -> list[AdapterRecord]:
        """Describe the first `limit` names after `after`."""
        ...

    async def adapter(self, name: str) -> AdapterRecord | None:
        """Describe one name, if there is one."""
        ...
