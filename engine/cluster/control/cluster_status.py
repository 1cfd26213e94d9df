"""Tell administrators what a cluster is doing: what its coordinator knows, or what a member's view says meanwhile."""

import time
from collections.abc import Mapping, Sequence

import msgspec

from engine.catalogue.base import (
    AdapterRecord,
    CatalogueEntry,
    ClusterRecord,
    MoveRecord,
    NodeRecord,
    ReplacementRecord,
    RouterRecord,
    SizeRecord,
    names_after,
)
from engine.cluster.control.ask_messages import StatusAsk, StatusTold
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.control.shared_catalogue import SharedCatalogue
from engine.cluster.view import ClusterView
from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.cluster_size import WantedSize
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.coordinator.planning import Replacement
from scheduler.cluster.protocol.messages import Report
from scheduler.cluster.state import RoutingTable


class CoordinatorStatus:
    """What the coordinator knows. Used on its event loop; what it is given belongs to the server."""

    def __init__(
        self, streams: Mapping[str, MemberStream], catalogue: SharedCatalogue, coordinator: Coordinator
    ) -> None:
        self._streams, self._catalogue, self._coordinator = streams, catalogue, coordinator

    def answer(self, ask: StatusAsk) -> StatusTold:
        """Answer a router that asks."""
        match ask.what:
            case "cluster":
                told: object = self.cluster()
            case "adapters":
                told = self.adapters(names_after(self._catalogue.entries, ask.after, ask.limit))
            case "adapter":
                told = self.adapters([ask.after] if ask.after in self._catalogue.entries else [])
        return StatusTold(ask.number, msgspec.msgpack.encode(told))

    def cluster(self) -> ClusterRecord:
        """Describe the cluster."""
        coordinator, now_s = self._coordinator, time.monotonic()
        plans, streams = coordinator.plans, self._streams.values()
        return ClusterRecord(
            epoch=self._catalogue.epoch,
            table_version=coordinator.table.version,
            adapters=len(self._catalogue.entries),
            nodes=[self._node(each) for each in streams if each.is_node],
            routers=[
                RouterRecord(each.hello.name, each.hello.start, each.report and each.report.table_version)
                for each in streams
                if not each.is_node
            ],
            replacements=plans.count,
            last_replacements=[_replacement(each, now_s) for each in reversed(plans.last)],
            size=_size(coordinator.size.told, now_s),
        )

    def adapters(self, names: Sequence[str]) -> list[AdapterRecord]:
        """Describe these names, which the catalogue has."""
        tiers = self._tiers()
        table, entries = self._coordinator.table, self._catalogue.entries
        return [record_of(entries[name], tiers.get(entries[name].ref, {}), table) for name in names]

    def _tiers(self) -> dict[AdapterRef, dict[str, str]]:
        """Tell where each content is, by node, as nodes last reported."""
        found: dict[AdapterRef, dict[str, str]] = {}
        for name, stream in self._streams.items():
            report = stream.report
            if isinstance(report, Report):
                for tier, refs in (("arriving", report.loading), ("device", (*report.held, *report.cached))):
                    for ref in refs:
                        found.setdefault(ref, {})[name] = tier
        return found

    def _node(self, stream: MemberStream) -> NodeRecord:
        hello, report = stream.hello, stream.report
        at = (hello.address, hello.zone, stream.session)
        if not isinstance(report, Report) or self._coordinator.session(hello.name) is None:
            return NodeRecord(hello.name, "joining", *at)
        return NodeRecord(
            hello.name,
            "leaving" if self._coordinator.is_leaving(hello.name) else "serving",
            *at,
            table_version=report.table_version,
            memory_bytes=report.machine.memory_bytes,
            used_bytes=sum(ref.nbytes for ref in (*report.held, *report.cached, *report.loading)),
            load=self._coordinator.load(hello.name),
            slowdown=report.slowdown,
            held=len(report.held),
            arriving=len(report.loading),
            cached=len(report.cached),
        )


def _size(told: WantedSize | None, now_s: float) -> SizeRecord | None:
    if told is None:
        return None
    age_s, bounds = round(now_s - told.last.at_s, 1), told.bounds
    return SizeRecord(told.wanted, told.present, age_s, told.last.reason, bounds.lowest, bounds.highest)


def _replacement(made: Replacement, now_s: float) -> ReplacementRecord:
    moves = [MoveRecord(each.adapter.name, each.gained, each.lost) for each in made.moves]
    age_s = round(now_s - made.at_s, 1)
    return ReplacementRecord(age_s, made.adapters, made.nbytes, made.reasons, moves)


def record_of(entry: CatalogueEntry, tiers: Mapping[str, str], table: RoutingTable) -> AdapterRecord:
    """Describe a name of the catalogue, whose content is at these nodes."""
    ref = entry.ref
    return AdapterRecord(
        name=entry.name,
        version=ref.digest,
        alias_of=entry.alias_of or None,
        source=entry.root,
        rank=ref.rank,
        bytes=ref.nbytes,
        effect=entry.effect,
        pinned=entry.pinned,
        max_requests=entry.max_requests,
        copies=sum(tier == "device" for tier in tiers.values()),
        tiers=tiers,
        shares={share.node: share.part for share in table.shares.get(ref, ())},
        targets=entry.targets,
    )


def cluster_of_view(view: ClusterView) -> ClusterRecord:
    """Describe what a member remembers of its cluster while no coordinator answers."""
    nodes = [
        NodeRecord(each.name, "serving", each.address, each.zone, each.session)
        for each in view.members.values()
    ]
    return ClusterRecord(None, view.table.version, len(view.catalogue), nodes)


def adapters_of_view(view: ClusterView, names: Sequence[str]) -> list[AdapterRecord]:
    """Describe names of a member's view. Where their contents are it does not know, but where requests are sent."""
    return [record_of(view.catalogue[name], {}, view.table) for name in names]
