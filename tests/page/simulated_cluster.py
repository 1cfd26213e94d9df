"""A cluster that exists only as what an administrator is told of it: nodes, adapters of many ranks, traffic, a kill."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from engine.catalogue.base import (
    AdapterRecord,
    ClusterRecord,
    MoveRecord,
    NodeRecord,
    ReplacementRecord,
    RouterRecord,
    SizeRecord,
    names_after,
)
from engine.errors import UnknownModel
from engine.metrics.series import MetricSeries
from tests.engine.api.session import TOKENIZER
from tests.fakes.engine_client import FakeCatalogue, FakeClient, Stats

RANKS = (8, 16, 32, 64, 128)
_MEMORY = 6 << 30
_BYTES_A_RANK = 5 << 17


class SimulatedCluster:
    """What a router would tell. `engine` serves it; `names` are more adapters than `adapters` made-up ones."""

    def __init__(self, nodes: int = 4, adapters: int = 200, names: Iterable[str] = (), seed: int = 1) -> None:
        self._random = random.Random(seed)
        self.nodes = [f"node-{at}" for at in range(nodes)]
        self.lost: set[str] = set()
        self.records: dict[str, AdapterRecord] = {}
        self._moved, self._refused = 0, Counter[str]()
        self._sent = Counter[str]()
        self._placements: list[tuple[float, ReplacementRecord]] = []
        self._clock_s = 0.0
        self.size: SizeRecord | None = None
        for at in range(adapters):
            self._place(f"tenant-{at:05d}/style", RANKS[at * len(RANKS) // max(1, adapters)])
        for name in names:
            self._place(name, 16)
        self._note("start", list(self.records)[:8], adapters)
        self.engine = FakeClient(TOKENIZER, tuple(self.records))
        self.engine.catalogue = _Catalogue(self)
        self.engine.series = self._series
        self.engine.stats = lambda: Stats(running=19 * len(self.alive()), waiting=4 * len(self.lost))

    def alive(self) -> list[str]:
        """The nodes that serve."""
        return [node for node in self.nodes if node not in self.lost]

    def pass_time(self, seconds: float, requests: int) -> None:
        """Let requests come: the popular adapters, and every rank at its pace."""
        self._clock_s += seconds
        self._arrive()
        names = list(self.records)
        for _ in range(requests):
            name = names[min(len(names) - 1, int(self._random.paretovariate(0.6)) * 7 % len(names))]
            record, telemetry = self.records[name], self.engine.telemetry
            rank = record.rank or 8
            telemetry.started(name)
            telemetry.first_token(name, self._random.lognormvariate(-2.2 + rank / 160, 0.5))
            for _ in range(6):
                telemetry.next_token(name, self._random.lognormvariate(-4.2 + rank / 200, 0.3))
            telemetry.finished(name, "stop", 200, 7)
            self._sent[self._random.choice(self.alive())] += 1
        self._refused["overloaded"] += requests // 40
        for name in self._random.sample(names, min(20, len(names))):
            self.records[name] = replace(
                self.records[name], in_flight=self._random.randrange(4), last_use_s=1.8e9
            )

    def kill(self, node: str) -> None:
        """Lose a node: its adapters go to the others, which pull what they lack."""
        self.lost.add(node)
        orphans = [record for record in self.records.values() if node in record.tiers]
        for record in orphans:
            rest = {each: tier for each, tier in record.tiers.items() if each != node}
            heir = self._random.choice(self.alive())
            tiers = rest or {heir: "arriving"}
            self.records[record.name] = replace(
                record, tiers=tiers, shares=dict.fromkeys(tiers, 1 / len(tiers))
            )
        self._moved += 37
        self._note("node_left", [record.name for record in orphans[:8]], len(orphans), node)

    def _arrive(self) -> None:
        for record in self.records.values():
            if "arriving" in record.tiers.values() and self._random.random() < 0.3:
                self.records[record.name] = replace(record, tiers=dict.fromkeys(record.tiers, "device"))

    def _place(self, name: str, rank: int) -> None:
        homes = self._random.sample(self.nodes, 2 if self._random.random() < 0.15 else 1)
        home = self.nodes[min(len(self.nodes) - 1, RANKS.index(rank) * len(self.nodes) // len(RANKS))]
        homes = list(dict.fromkeys((home, *homes[1:])))
        parts = [0.7, 0.3] if len(homes) > 1 else [1.0]
        digest = self._random.randbytes(32).hex()
        self.records[name] = AdapterRecord(
            name, digest, None, name, rank, rank * _BYTES_A_RANK, copies=len(homes),
            tiers=dict.fromkeys(homes, "device"), shares=dict(zip(homes, parts, strict=True)),
        )  # fmt: skip

    def _note(self, reason: str, names: Iterable[str], count: int, lost: str = "") -> None:
        moves = [MoveRecord(name, list(self.records[name].tiers), [lost] if lost else []) for name in names]
        made = ReplacementRecord(0.0, count, count * 20 * _BYTES_A_RANK, [reason], moves)
        self._placements.insert(0, (self._clock_s, made))

    def cluster(self) -> ClusterRecord:
        """What GET /cluster tells."""
        last = [replace(each, age_s=self._clock_s - at_s) for at_s, each in self._placements]
        return ClusterRecord(
            1_800_000_000, 7, len(self.records), [self._node(node) for node in self.alive()],
            [RouterRecord("router-0", 1, 7)], len(last), last, self.size,
        )  # fmt: skip

    def _node(self, node: str) -> NodeRecord:
        here = [record for record in self.records.values() if node in record.tiers]
        arriving = sum(record.tiers[node] == "arriving" for record in here)
        used = sum(record.bytes or 0 for record in here)
        load = 0.35 + 0.15 * self.nodes.index(node) + 0.2 * len(self.lost)
        return NodeRecord(
            node, "serving", f"10.0.0.{self.nodes.index(node)}:7001", "abc"[self.nodes.index(node) % 3], 1, 7,
            _MEMORY, min(used, _MEMORY), min(load, 1.0), 1.04, len(here) - arriving, arriving, 0,
            self._random.randrange(8, 30), 64,
        )  # fmt: skip

    def _series(self) -> tuple[MetricSeries, ...]:
        refused = [((reason,), float(count)) for reason, count in self._refused.items()]
        sent = [((node,), float(count)) for node, count in sorted(self._sent.items())]
        moved = [((), float(self._moved))]
        return (
            MetricSeries("loraserve_requests_refused", "", ("reason",), refused, "counter"),
            MetricSeries("loraserve_requests_forwarded", "", ("node",), sent, "counter"),
            MetricSeries("loraserve_requests_moved", "", (), moved, "counter"),
        )


class _Catalogue(FakeCatalogue):
    """The registry of a simulated cluster."""

    def __init__(self, simulated: SimulatedCluster) -> None:
        super().__init__(simulated.engine)
        self._simulated = simulated

    async def records(self, after: str, limit: int) -> list[AdapterRecord]:
        records = self._simulated.records
        return [records[name] for name in names_after(records, after, limit)]

    async def record(self, name: str) -> AdapterRecord:
        if name not in self._simulated.records:
            raise UnknownModel(name)
        return self._simulated.records[name]

    async def cluster(self) -> ClusterRecord:
        return self._simulated.cluster()
