"""Small clusters for tests, on the derived H100 profile."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.coordinator.demand import DemandOptions, DemandTracker
from scheduler.cluster.coordinator.replan import Replanner, ReplanOptions
from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Lengths, from_json
from scheduler.cluster.placement.balanced import BalancedPlacement, StepMeasure
from scheduler.cluster.placement.base import PlacementPolicy
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.load_view import LoadView
from scheduler.cluster.routing.predicted_cost import PredictedCostRouting
from scheduler.cluster.routing.router import Router
from scheduler.cluster.routing.slo_admission import SloAdmission
from scheduler.limits import StepLimits
from scheduler.sim.network import NetworkFaults
from scheduler.sim.spec import Fault, FaultKind, NodeSpec, SimulatorSpec
from scheduler.sim.workload.adapters import EQUAL, SKEWED, RankMix, catalogue
from scheduler.sim.workload.popularity import PowerLaw, assigned
from scheduler.sim.workload.trace import Arrival, poisson

MIB = 2**20
PROFILE = from_json((Path(__file__).parents[3] / "scheduler/cluster/profiles/h100_llama8b.json").read_text())
LOSSY = NetworkFaults(loss=0.1, double=0.1, late=0.2, late_s=3.0)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"n{at}" for at in range(count))


def node_spec(
    kernel: Kernel = Kernel.EXACT, memory_bytes: int = 4096 * MIB, kv_bytes: int = 32768 * MIB
) -> NodeSpec:
    """An H100 of whose memory adapters take `memory_bytes` at most, and K/V never less than `kv_bytes`."""
    points = PROFILE.operating_points(kernel, (8, 16, 32, 64, 128))
    limits = StepLimits(max_num_seqs=128, max_num_batched_tokens=2048, max_model_len=8192)
    machine = NodeHardware(memory_bytes, points)
    return NodeSpec(machine, PROFILE.model(kernel), limits, memory_bytes + kv_bytes)


def routers(
    forecast: Forecast, admission: Callable[[], SloAdmission | None] = lambda: None
) -> Callable[[np.random.Generator], Router]:
    """Make routers of ours; they refuse nothing unless they are given an admission."""
    policy = PredictedCostRouting(CostEstimator(forecast), PROFILE.slo)
    return lambda rng: Router(policy, admission(), LoadView(2), rng)


def simulator_spec(
    nodes: int,
    adapters: tuple[AdapterRef, ...],
    node: NodeSpec | None = None,
    policy: PlacementPolicy | None = None,
    faults: tuple[Fault, ...] = (),
    network_faults: NetworkFaults | None = None,
    router: Callable[[np.random.Generator], Router] | None = None,
) -> SimulatorSpec:
    """Our policies, on a wire without faults unless some are given."""
    node = node or node_spec()
    forecast = Forecast(node.model, Lengths(300, 40))

    def coordinator(epoch: int) -> Coordinator:
        deciding = policy or BalancedPlacement(forecast)
        planner = Replanner(deciding, StepMeasure(forecast, PROFILE.slo.tbt_s), ReplanOptions())
        return Coordinator(planner, DemandTracker(DemandOptions()), CoordinatorOptions(), epoch)

    return SimulatorSpec(
        node=node,
        nodes=names(nodes),
        adapters=adapters,
        coordinator=coordinator,
        router=router or routers(forecast),
        faults=faults,
        network_faults=network_faults or NetworkFaults(),
    )


def adapters(count: int = 24, mix: RankMix = EQUAL) -> tuple[AdapterRef, ...]:
    """A catalogue of 1 MiB for each rank row."""
    return catalogue(count, mix, MIB)


def traffic(refs: tuple[AdapterRef, ...], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Short requests, popularity skewed."""
    rng = np.random.default_rng(seed)
    return list(assigned(poisson(rate, seconds, (300, 40), rng), refs, PowerLaw(0.4), rng))


def draw_faults(
    count: int, seconds: float, nodes: tuple[str, ...], rng: np.random.Generator
) -> tuple[Fault, ...]:
    """Draw `count` faults within `seconds`, in order of time: crashes, partitions, slow nodes, restarts and dead
    coordinators, each of up to a third of the nodes and a sixth of the time."""
    kinds = (
        FaultKind.CRASH,
        FaultKind.CRASH,
        FaultKind.PARTITION,
        FaultKind.SLOW,
        FaultKind.RESTART,
        FaultKind.COORDINATOR,
    )
    drawn: list[Fault] = []
    for start_s in np.sort(rng.random(count) * seconds).tolist():
        kind = kinds[int(rng.integers(len(kinds)))]
        hit = rng.permutation(len(nodes))[: int(rng.integers(1, max(2, len(nodes) // 3 + 1)))]
        names = tuple(nodes[at] for at in sorted(hit.tolist()))
        lasts_s = float(rng.uniform(0.5, max(1.0, seconds / 6)))
        drawn.append(Fault(kind, start_s, lasts_s, names, factor=float(rng.uniform(1.5, 4.0))))
    return tuple(drawn)


def chaos(seed: int) -> tuple[SimulatorSpec, list[Arrival]]:
    """A cluster of two to five nodes on a lossy wire, with faults for 40 s, and what is asked of it."""
    rng = np.random.default_rng(seed)
    refs = adapters(24, SKEWED if seed % 2 else EQUAL)
    nodes = int(rng.integers(2, 6))
    memory_bytes, kv_bytes = (int(rng.choice(mib)) * MIB for mib in ([256, 600, 4000], [1024, 2048, 32768]))
    host_bytes = int(rng.choice([0, 300, 4000])) * MIB
    node = replace(node_spec(memory_bytes=memory_bytes, kv_bytes=kv_bytes), host_bytes=host_bytes)
    faults = draw_faults(int(rng.integers(2, 6)), 40.0, names(nodes), rng)
    spec = simulator_spec(nodes, refs, node, faults=faults, network_faults=LOSSY)
    return spec, traffic(refs, float(rng.uniform(2, 10)), 40.0, seed)
