"""What a simulated cluster is, and what goes wrong with it when: drawn beforehand, so that a seed names a
history."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.routing.base import RoutingPolicy
from scheduler.sim.network import CopySpeeds, NetworkFaults, NetworkTimes
from scheduler.sim.node import NodeSpec


class FaultKind(Enum):
    """CRASH: nodes die at once and start anew, empty, when it is over. PARTITION: nodes reach only each
    other. SLOW: their steps take `factor` times as long. LEAVE: they ask to go. COORDINATOR: it dies, and a
    new one that knows only the registry takes its place when it is over."""

    CRASH = "crash"
    PARTITION = "partition"
    SLOW = "slow"
    LEAVE = "leave"
    COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Fault:
    """From `start_s` on, for `lasts_s`."""

    kind: FaultKind
    start_s: float
    lasts_s: float
    nodes: tuple[str, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class SimulatorSpec:
    """`coordinator` makes one of the given epoch; all nodes are of one `node` spec."""

    node: NodeSpec
    nodes: tuple[str, ...]
    adapters: tuple[AdapterRef, ...]
    coordinator: Callable[[int], Coordinator]
    routing: RoutingPolicy
    speeds: CopySpeeds = field(default_factory=CopySpeeds)
    times: NetworkTimes = field(default_factory=NetworkTimes)
    network_faults: NetworkFaults = field(default_factory=NetworkFaults)
    faults: tuple[Fault, ...] = ()
