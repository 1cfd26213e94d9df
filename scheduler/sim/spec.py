"""What a simulated cluster is, and what goes wrong with it when: drawn beforehand, so that a seed names a
history."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.cost.model import CostModel
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.routing.router import Router
from scheduler.limits import DEFAULTS, StepLimits
from scheduler.sim.memory.store import StoreSpec
from scheduler.sim.network import CopySpeeds, NetworkFaults, NetworkTimes
from scheduler.sim.true_costs import AS_PROFILED, Deviation
from scheduler.unified_pool import PoolSplit


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a simulated node is made of.

    `model` is what policies are told that its steps cost, `deviation` how far they are from that. Where `step_s` is
    given steps are to last no longer, as far as prompts can wait. A node that `learns` tells what its steps cost.

    The card has `memory_bytes` for K/V and adapters together, of which adapters take `machine.memory_bytes` at
    most; they share them as the live engine does, or not at all unless `unified`. What leaves the card stays in
    `host_bytes` of the host's memory. More than `max_waiting` sequences never wait.
    """

    machine: NodeHardware
    model: CostModel
    limits: StepLimits
    memory_bytes: int
    kv_token_bytes: int = 128 << 10
    block_tokens: int = DEFAULTS.block_size
    unified: bool = True
    host_bytes: int = 0
    max_waiting: int = DEFAULTS.max_waiting
    store: StoreSpec = field(default_factory=StoreSpec)
    others: tuple[CostModel, ...] = ()  # the profile's models of other kernels
    deviation: Deviation = AS_PROFILED
    step_s: float | None = None
    learns: bool = True

    def split(self) -> PoolSplit:
        """Return how the card's memory is divided. Raises ValueError if it is too small."""
        block_bytes = self.block_tokens * self.kv_token_bytes
        longest = -(-self.limits.max_model_len // self.block_tokens)
        adapter_bytes, page_bytes = self.machine.memory_bytes, self.store.page_bytes
        split = PoolSplit.bounded(self.memory_bytes, adapter_bytes, block_bytes, page_bytes, longest)
        if self.unified:
            return split
        return replace(split, kv=split.least_kv, least_adapters=split.quanta - split.least_kv)


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
