"""What a simulated cluster is, and what goes wrong with it when: drawn beforehand, so that a seed names a
history."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.routing.router import Router
from scheduler.sim.network import CopySpeeds, NetworkFaults, NetworkTimes
from scheduler.sim.node import NodeSpec


class FaultKind(Enum):
    """CRASH: nodes die at once and start anew, empty, when it is over. PARTITION: nodes reach only each
    other. SLOW: their steps take `factor` times as long. LEAVE: they ask to go. RESTART: they ask to go, and
    start anew as soon as they are let go. ROUTER: routers die, and start anew when it is over. COORDINATOR: it
    dies, and a new one that knows only the registry takes its place when it is over."""

    CRASH = "crash"
    PARTITION = "partition"
    SLOW = "slow"
    LEAVE = "leave"
    RESTART = "restart"
    ROUTER = "router"
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
    """`coordinator` makes one of the given epoch, `router` the decisions of one router; all nodes are of one `node`
    spec. Nodes tell each router their load every `load_s`. One that leaves has `drain_s` to end its streams.
    Clients that are refused ask again up to `client_retries` times.
    """

    node: NodeSpec
    nodes: tuple[str, ...]
    adapters: tuple[AdapterRef, ...]
    coordinator: Callable[[int], Coordinator]
    router: Callable[[np.random.Generator], Router]
    routers: tuple[str, ...] = ("r0", "r1")
    load_s: float = 0.1
    drain_s: float = 5.0
    client_retries: int = 0
    speeds: CopySpeeds = field(default_factory=CopySpeeds)
    times: NetworkTimes = field(default_factory=NetworkTimes)
    network_faults: NetworkFaults = field(default_factory=NetworkFaults)
    faults: tuple[Fault, ...] = ()
