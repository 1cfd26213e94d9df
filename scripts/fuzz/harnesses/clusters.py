"""Simulate small clusters under faults of every kind, and check all that must hold after every event."""

import random
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from scheduler.sim.ablations.named_policies import named
from scheduler.sim.network import NetworkFaults
from scheduler.sim.replay import Workload, described
from scheduler.sim.simulator import Simulator
from scheduler.sim.spec import Fault, FaultKind
from scripts.figures.cluster_run import ClusterRun, Traces, hardware, read_traces, traffic
from scripts.fuzz.case import Case, Finding

_HEAD = "cluster"
_POLICIES = (
    "ours",
    "ours",
    "ours",
    "ours-routing-only",
    "ours-placement-only",
    "paper-our-routing",
    "toppings",
)
_KERNELS = ("padded", "exact", "multi-rank", "fixed")
_LAWS = ("power:0.3", "zipf:0.8", "zipf:1.2", "uniform", "flash")
_MOST_FAULTS = 6


@dataclass(frozen=True, slots=True)
class Disorder:
    """What is added to a run: `faults` of those drawn by the run's seed, and a wire that is this bad.

    Clients that are refused ask again up to `retries` times. Nodes have `host_gib` for what leaves the card.
    """

    faults: int = 0
    loss: float = 0.0
    double: float = 0.0
    late: float = 0.0
    retries: int = 0
    host_gib: float = 64.0


class ClustersTarget:
    """Draws a cluster, its traffic and its faults; a broken promise ends the run with an AssertionError."""

    def __init__(self) -> None:
        """Use drawn traces."""
        self._traces: Traces = read_traces(None)

    def whole(self) -> list[Case]:
        """Return a cluster that nothing happens to."""
        return [_case(ClusterRun("ours", rate=4.0, seconds=8.0, lead_s=4.0, warm_s=0.0), Disorder())]

    def draw(self, chance: random.Random) -> Case:
        """Draw a cluster of two to six nodes, its policy and all that happens to it."""
        run = ClusterRun(
            policy=chance.choice(_POLICIES),
            kernel=chance.choice(_KERNELS),
            ranks=chance.choice(("equal", "skewed")),
            law=chance.choice(_LAWS),
            adapters=chance.randrange(4, 80),
            nodes=chance.randrange(2, 7),
            memory_gib=chance.choice((4.0, 6.0, 10.0, 27.0)),
            rate=chance.uniform(1.0, 6.0),
            seconds=chance.uniform(6.0, 16.0),
            warm_s=0.0,
            lead_s=chance.choice((0.0, 4.0, 8.0)),
            seed=chance.randrange(1 << 32),
            arrivals=chance.choice(("trace", "gamma")),
            tenants=chance.choice((0, 3)),
            turns=chance.choice((1.0, 3.0)),
            true_kernel=chance.choice(("", *_KERNELS)),
            sigma=chance.choice((0.0, 0.1, 0.4)),
        )
        wire = chance.choice((0.0, 0.1, 0.2))
        disorder = Disorder(
            chance.randrange(_MOST_FAULTS + 1),
            wire,
            wire,
            wire,
            chance.randrange(3),
            chance.choice((0.0, 1.0, 64.0)),
        )
        return _case(run, disorder)

    def run(self, case: Case) -> str:
        """Simulate the case; return whether anything was refused. Raises Finding, AssertionError."""
        run, disorder = msgspec.json.decode(case.content, type=tuple[ClusterRun, Disorder])
        offered = traffic(run, self._traces)
        if not offered.arrivals:
            return "nothing was asked"
        offered = replace(offered, faults=drawn_faults(disorder.faults, run))
        simulator = _simulator(run, disorder, offered)
        simulator.run(offered.arrivals, offered.seconds)
        records = simulator.records
        if sorted(records) != sorted(each.name for each in offered.arrivals):
            raise Finding(f"{len(offered.arrivals)} requests came and {len(records)} were answered")
        if open_ := [name for name, record in records.items() if record.end_s is None]:
            raise Finding(f"{len(open_)} answers have no end, {open_[0]} is one")
        return "all served" if all(record.served for record in records.values()) else "some refused"

    def check(self) -> None:
        """Find nothing: a simulation leaves nothing behind."""

    def close(self) -> None:
        """End nothing."""


def _case(run: ClusterRun, disorder: Disorder) -> Case:
    return Case(_HEAD, msgspec.json.encode((run, disorder)))


def _simulator(run: ClusterRun, disorder: Disorder, offered: Workload) -> Simulator:
    nodes = replace(hardware(run, offered), host_bytes=int(disorder.host_gib * 2**30))
    spec = described(named(run.policy), run.nodes, nodes, offered, run.seed)
    wire = NetworkFaults(disorder.loss, disorder.double, disorder.late, late_s=3.0)
    spec = replace(spec, network_faults=wire, client_retries=disorder.retries)
    return Simulator(spec, run.seed, audit=True)


def drawn_faults(count: int, run: ClusterRun) -> tuple[Fault, ...]:
    """Draw faults of every kind but LEAVE by the run's seed; at least one node stays as it is."""
    rng = np.random.default_rng([run.seed, 23])
    kinds = [kind for kind in FaultKind if kind is not FaultKind.LEAVE]
    drawn: list[Fault] = []
    for start_s in np.sort(run.lead_s + rng.random(count) * run.seconds).tolist():
        kind = kinds[int(rng.integers(len(kinds)))]
        names = ("r0", "r1") if kind is FaultKind.ROUTER else tuple(f"n{at}" for at in range(run.nodes))
        order: list[int] = rng.permutation(len(names))[: int(rng.integers(1, len(names)))].tolist()
        hit = tuple(names[at] for at in sorted(order))
        lasts_s, factor = float(rng.uniform(0.5, 12.0)), float(rng.uniform(1.5, 4.0))
        drawn.append(Fault(kind, start_s, lasts_s, hit, factor))
    return tuple(drawn)
