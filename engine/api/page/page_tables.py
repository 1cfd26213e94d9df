"""Collect what the page shows as tables, from what an engine tells its administrators and Prometheus."""

import time
from collections.abc import Mapping, Sequence

import msgspec

from engine.api.base import ObservedServer
from engine.api.openapi.document import software_version
from engine.api.page.rank_latencies import RankLatencies
from engine.api.page.table_changes import Row, Tables
from engine.catalogue.base import AdapterRecord, ClusterRecord, NodeRecord, ReplacementRecord, RouterRecord
from engine.metrics.adapter_totals import OTHER, Totals
from engine.metrics.series import CollectSeries, MetricSeries
from engine.metrics.snapshot import Snapshot, Standing
from engine.waiting.task_pool import TaskPool

_PAGE = 1000  # names that a registry is asked for at once
_VERSION_CHARS = 12  # of a digest: enough to tell versions apart
_COUNTERS = (
    "loraserve_requests_refused",
    "loraserve_requests_forwarded",
    "loraserve_requests_moved",
    "loraserve_streams_moved",
)
_BATCHES = ("loraserve_batches", "loraserve_batches_ended", "loraserve_batch_requests_left")


class PageTables:
    """The tables of one server. Used on one event loop; what takes long is done by `pool`."""

    def __init__(self, server: ObservedServer, pool: TaskPool, collect: CollectSeries) -> None:
        """Show `server`, and of its metrics what `collect` tells."""
        self._observed, self._pool, self._collect = server, pool, collect
        self._latencies = RankLatencies()
        self._placed_s: dict[int, float] = {}  # when each replacement was made, in seconds since 1970

    async def collect(self) -> Tables:
        """Return the tables of this moment. Raises EngineError."""
        server = self._observed
        cluster, records = await server.catalogue.cluster(), await self._records()
        stats, series, totals = server.stats(), self._collect(), server.telemetry.totals()
        return await self._pool.run(lambda: self._tables(cluster, records, stats, series, totals))

    async def _records(self) -> list[AdapterRecord]:
        """Read the whole registry, part by part."""
        found: list[AdapterRecord] = []
        while True:
            part = await self._observed.catalogue.records(found[-1].name if found else "", _PAGE)
            found += part
            if len(part) < _PAGE:
                return found

    def _tables(
        self,
        cluster: ClusterRecord,
        records: Sequence[AdapterRecord],
        stats: Snapshot | Standing,
        series: Sequence[MetricSeries],
        totals: Mapping[str, Totals],
    ) -> Tables:
        ranks = {record.name: record.rank for record in records if record.rank is not None}
        ranks |= dict.fromkeys(self._observed.model_names, 0)
        self._latencies.take_in(totals, ranks)
        return {
            "server": {"": self._server(cluster, stats)},
            "nodes": {each.name: _told(each) for each in cluster.nodes},
            "routers": {each.name: _told(each) for each in cluster.routers},
            "adapters": {record.name: _adapter(record) for record in records},
            "latency": self._latencies.rows(),
            "recent": {name: _recent(each) for name, each in totals.items() if name != OTHER},
            "counters": _counters(series),
            "placements": self._placements(cluster),
            "size": _size(cluster),
            "batches": _batches(series),
        }

    def _server(self, cluster: ClusterRecord, stats: Snapshot | Standing) -> Row:
        told: dict[str, object] = {
            "model": self._observed.model_name,
            "version": software_version(),
            "time_s": int(time.time()),
            "epoch": cluster.epoch,
            "table_version": cluster.table_version,
            "adapters": cluster.adapters,
            "replacements": cluster.replacements,
            "healthy": stats.trouble is None,
        }
        if isinstance(stats, Standing):
            return told
        blocks = stats.blocks
        return told | {
            "running": stats.running,
            "waiting": stats.waiting,
            "preemptions": stats.preemptions,
            "kv_blocks": {"used": blocks.used, "cached": blocks.cached, "free": blocks.free},
        }

    def _placements(self, cluster: ClusterRecord) -> dict[str, Row]:
        """Tell the last replacements by number; an age would make each another row every time."""
        last: Sequence[ReplacementRecord] = cluster.last_replacements
        newest = cluster.replacements or 0
        numbered = [(newest - at, each) for at, each in enumerate(last)]
        known, now_s = self._placed_s, time.time()
        self._placed_s = {
            number: known.get(number, round(now_s - each.age_s, 1)) for number, each in numbered
        }
        return {
            str(number): {
                "at_s": self._placed_s[number],
                "adapters": each.adapters,
                "bytes": each.bytes,
                "reasons": list(each.reasons),
                "moves": [_told(move) for move in each.moves],
            }
            for number, each in numbered
        }


def _told(record: NodeRecord | RouterRecord | object) -> dict[str, object]:
    """Write a record without what is not known."""
    fields: dict[str, object] = msgspec.to_builtins(record)
    return {name: value for name, value in fields.items() if value is not None}


def _size(cluster: ClusterRecord) -> dict[str, Row]:
    """Tell how many nodes there should be, where that follows the load."""
    if cluster.size is None:
        return {}
    told = _told(cluster.size)
    del told["age_s"]  # it would make another row every time
    return {"": told | {"at_s": round(time.time() - cluster.size.age_s)}}


def _adapter(record: AdapterRecord) -> Row:
    """Write what the page shows of every adapter, without what is as usual."""
    told: dict[str, object] = {
        "version": (record.version or "")[:_VERSION_CHARS],
        "rank": record.rank,
        "bytes": record.bytes,
        "tiers": dict(record.tiers),
        "shares": {node: round(part, 4) for node, part in record.shares.items()},
        "alias_of": record.alias_of,
        "targets": {each.name: each.share for each in record.targets},
        "error": record.error,
        "pinned": record.pinned,
        "max_requests": record.max_requests,
        "in_flight": record.in_flight,
        "last_use_s": record.last_use_s and int(record.last_use_s),
        "held_until_s": record.held_s and round(time.time() + record.held_s),
    }
    return {name: value for name, value in told.items() if value}


def _recent(totals: Totals) -> Row:
    return {
        "requests": totals.started,
        "output_tokens": totals.output_tokens,
        "finished": dict(totals.finished),
        "ttft": list(totals.ttft.counts),
        "tbt": list(totals.tbt.counts),
    }


def _batches(series: Sequence[MetricSeries]) -> dict[str, Row]:
    """Tell how many batches there are by state, and what is left of them; nothing where none is taken."""
    told: dict[str, object] = {
        values[0] if values else "left": int(count)
        for each in series
        if each.name in _BATCHES
        for values, count in each.samples
    }
    return {"": told} if told else {}


def _counters(series: Sequence[MetricSeries]) -> dict[str, Row]:
    """Tell the counters that the page shows, by name and label."""
    found: dict[str, Row] = {}
    for each in series:
        if each.name in _COUNTERS:
            name = each.name.removeprefix("loraserve_")
            for values, count in each.samples:
                found[" ".join((name, *values))] = {"name": name, "label": "".join(values), "count": count}
    return found
