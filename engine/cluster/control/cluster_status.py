"""Tell an operator what a cluster is doing: plain values, which HTTP sends as JSON.

A router tells what its view says. The coordinator also tells what nodes report: what they hold, and what moves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.cluster.control.coordinator_server import CoordinatorServer
from engine.cluster.view import CatalogueEntry, ClusterView
from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.protocol.messages import Report
from scheduler.cluster.state import RoutingTable

CopyState = str
"""`routed` in a router's view; `held`, `pulling` or `dropping` at the coordinator."""


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """A member; of a node that has reported also its memory, how much slower its steps are, and its adapters."""

    name: str
    kind: str
    address: str
    zone: str
    session: int
    memory_bytes: int | None = None
    used_bytes: int | None = None
    slowdown: float | None = None
    held: int | None = None
    moving: int | None = None
    table_version: int | None = None


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A cluster: who is in it, by which table requests go, and what is on its way where."""

    table_version: int
    adapters: int
    members: tuple[MemberStatus, ...]
    routes: Mapping[str, Mapping[str, float]]
    """By an adapter's name: the part of its requests that each node takes."""
    moves: Mapping[str, Mapping[str, CopyState]]
    """By an adapter's name: the nodes that fetch it or free it."""


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """A name of the catalogue, and where its content is."""

    name: str
    digest: str
    rank: int
    bytes: int
    root: str
    pinned: bool
    copies: Mapping[str, CopyState]


def status_of_view(view: ClusterView) -> ClusterStatus:
    """Tell what a member's view says of the cluster."""
    members = (
        MemberStatus(each.name, "node", each.address, each.zone, each.session)
        for each in view.members.values()
    )
    return ClusterStatus(view.table.version, len(view.catalogue), tuple(members), _routes(view.table), {})


def adapters_of_view(view: ClusterView) -> tuple[AdapterStatus, ...]:
    """Tell what a member's view says of the adapters: copies are those that requests are sent to."""
    shares = view.table.shares
    return tuple(
        _adapter(entry, {share.node: "routed" for share in shares.get(entry.ref, ())})
        for entry in view.catalogue.values()
    )


def status_of_coordinator(server: CoordinatorServer) -> ClusterStatus:
    """Tell what the coordinator knows of the cluster."""
    members: list[MemberStatus] = []
    for stream in server.streams.values():
        hello, report = stream.hello, stream.report
        if isinstance(report, Report):
            told = MemberStatus(
                hello.name, hello.kind, hello.address, hello.zone, stream.session,
                memory_bytes=report.machine.memory_bytes,
                used_bytes=sum(ref.nbytes for ref in (*report.held, *report.loading)),
                slowdown=report.slowdown,
                held=len(report.held),
                moving=len(report.loading),
                table_version=report.table_version,
            )  # fmt: skip
        else:
            version = None if report is None else report.table_version
            told = MemberStatus(
                hello.name, hello.kind, hello.address, hello.zone, stream.session, table_version=version
            )
        members.append(told)
    entries, table = server.catalogue.entries, server.coordinator.table
    moves = {
        name: moving
        for name, entry in entries.items()
        if (
            moving := {node: copy for node, copy in _copies(server, entry).items() if copy != Copy.HELD.value}
        )
    }
    return ClusterStatus(table.version, len(entries), tuple(members), _routes(table), moves)


def adapters_of_coordinator(server: CoordinatorServer) -> tuple[AdapterStatus, ...]:
    """Tell what the coordinator knows of the adapters."""
    return tuple(_adapter(entry, _copies(server, entry)) for entry in server.catalogue.entries.values())


def _copies(server: CoordinatorServer, entry: CatalogueEntry) -> dict[str, CopyState]:
    return {node: copy.value for node, copy in server.coordinator.copies(entry.ref).items()}


def _routes(table: RoutingTable) -> dict[str, dict[str, float]]:
    return {ref.name: {share.node: share.part for share in shares} for ref, shares in table.shares.items()}


def _adapter(entry: CatalogueEntry, copies: Mapping[str, CopyState]) -> AdapterStatus:
    ref = entry.ref
    return AdapterStatus(entry.name, ref.digest, ref.rank, ref.nbytes, entry.root, entry.pinned, copies)
