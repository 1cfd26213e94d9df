"""One policy, so many nodes, one workload: what comes of it. The capacity planner and the figures ask here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora.adapter import AdapterRef
from lora.memory.base import ResidencyPolicy
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Lengths, Profile
from scheduler.cluster.policies import Policy, Setting
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable
from scheduler.limits import DEFAULTS, StepLimits
from scheduler.sim.ablations.oracle_demand import oracle_rates
from scheduler.sim.memory.store import StoreSpec
from scheduler.sim.node import SimNode
from scheduler.sim.outcome import Outcome, Record, summary
from scheduler.sim.simulator import Simulator
from scheduler.sim.spec import Fault, NodeSpec, SimulatorSpec
from scheduler.sim.true_costs import AS_PROFILED, Deviation
from scheduler.sim.workload.trace import Arrival, Call
from scheduler.unified_pool import PoolSplit

_RANKS = (8, 16, 32, 64, 128)
_DRAIN = 100.0  # times as long as the traffic: far more than any backlog that is worth a figure


class GiveUp(Exception):
    """Raised by whoever watches a run and has seen enough."""


Watch = Callable[[float, Mapping[str, Record]], None]


@dataclass(frozen=True, slots=True)
class Hardware:
    """Nodes of one kind: a profile (it holds the SLO and the mean request too), the kernels, and the memory of each.

    `memory_bytes` are what the card has beside the base model, for K/V and adapters together. Adapters take at most
    `adapter_bytes` of it, two thirds unless told otherwise; what they do not take is K/V's. `host_bytes` of the
    host's memory keep what leaves the card. Steps that read prompts last no longer than the SLO's time between tokens
    where `bounds_steps`. Policies are told profile and kernels, and nothing of the nodes'
    `deviation` from them.
    """

    profile: Profile
    kernel: Kernel
    memory_bytes: int
    deviation: Deviation = AS_PROFILED
    adapter_bytes: int | None = None
    host_bytes: int = 64 << 30
    bounds_steps: bool = True

    def node(self, residency: ResidencyPolicy) -> NodeSpec:
        """Describe a node for the simulator; its operating points follow from the profile's SLO and mean request."""
        limits, block_tokens = self.profile.limits, DEFAULTS.block_size
        most = self.memory_bytes * 2 // 3 if self.adapter_bytes is None else self.adapter_bytes
        least_kv_tokens = (self.memory_bytes - most) // limits.kv_token_bytes
        steps = StepLimits(
            max_num_seqs=DEFAULTS.max_num_seqs,
            max_num_batched_tokens=limits.step_prompt_tokens,
            max_model_len=max(2, min(limits.kv_tokens // 2, least_kv_tokens)),
        )
        block_bytes = block_tokens * limits.kv_token_bytes
        needed = -(-steps.max_model_len // block_tokens)
        split = PoolSplit.bounded(self.memory_bytes, most, block_bytes, limits.page_bytes, needed)
        most = min(most, split.most_adapter_pages * limits.page_bytes)
        return NodeSpec(
            machine=NodeHardware(most, self.profile.operating_points(self.kernel, _RANKS)),
            model=self.profile.model(self.kernel),
            limits=steps,
            memory_bytes=self.memory_bytes,
            kv_token_bytes=limits.kv_token_bytes,
            host_bytes=self.host_bytes,
            store=StoreSpec(limits.page_bytes, residency),
            others=self.profile.models,
            deviation=self.deviation,
            step_s=self.profile.slo.tbt_s if self.bounds_steps else None,
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """`arrivals` in order of time within `seconds`.

    Those before `warm_s` let the cluster settle and are not counted. Nor are those before the first plan is in
    place, if that takes longer, but the second half of the run counts in any case. `faults` happen meanwhile.
    """

    arrivals: Sequence[Arrival]
    adapters: tuple[AdapterRef, ...]
    seconds: float
    warm_s: float = 0.0
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """What there was at one second: transfers and bytes moved over the network so far, and bytes over all nodes.

    `kept_bytes` are of what is kept on the coordinator's behalf, `used_bytes` with what is cached beyond
    that.
    """

    at_s: float
    pulls: int
    moved_bytes: int
    kept_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Replay:
    """A run: the figures of what came from `counted_s` on, every record, a sample for each second, and `steps` in
    all.

    `table` is the routing table when the traffic ended, `busy` each node's part of the time spent computing
    until then. Where the run was given up `finished` is false and the figures are of the requests answered by
    then, which flatters.
    """

    finished: bool
    outcome: Outcome
    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    table: RoutingTable
    busy: dict[str, float]
    steps: int = 0
    counted_s: float = 0.0

    @property
    def last(self) -> Sample:
        """Return the sample when the traffic ended."""
        return self.samples[-1]


def mean_lengths(calls: Sequence[Call]) -> Lengths:
    """Return the mean request."""
    return Lengths(
        float(np.mean([call.prompt_tokens for call in calls])),
        float(np.mean([call.output_tokens for call in calls])),
    )


def replay(
    policy: Policy,
    nodes: int,
    hardware: Hardware,
    traffic: Workload,
    seed: int,
    watch: Watch = lambda at_s, records: None,
) -> Replay:
    """Run `traffic` through `nodes` nodes under `policy`. `watch` is called once each virtual second with the
    time and the records so far, and may raise GiveUp."""
    simulator = Simulator(described(policy, nodes, hardware, traffic, seed), seed)
    sampler = _Sampler(simulator, traffic.seconds, watch)
    finished = True
    try:
        simulator.run(traffic.arrivals, traffic.seconds, drain_s=_DRAIN * traffic.seconds)
    except GiveUp:
        finished = False
    records = tuple(simulator.records.values())
    steps = sum(node.steps for node in simulator.cluster.nodes.values())
    placed_s = min(sampler.placed_s or 0.0, traffic.seconds / 2)
    counted_s = max(traffic.warm_s, placed_s)
    counted = (record for record in records if record.arrival.call.arrival_s >= counted_s)
    outcome = summary(counted, hardware.profile.slo, traffic.seconds - counted_s)
    samples = tuple(sampler.samples)
    return Replay(finished, outcome, records, samples, sampler.table, sampler.busy, steps, counted_s)


class _Sampler:
    """Samples a simulation once a virtual second while traffic comes."""

    def __init__(self, simulator: Simulator, seconds: float, watch: Watch) -> None:
        self.samples: list[Sample] = []
        self.table: RoutingTable = EMPTY_TABLE
        self.busy: dict[str, float] = {}
        self.placed_s: float | None = None  # when all that a table names was first where it names it
        self._simulator, self._watch = simulator, watch
        self._seconds = seconds
        simulator.clock.at(min(1.0, seconds), self._look)

    def _look(self) -> None:
        """Sample once more when the traffic ends; from then on only watch."""
        now = self._simulator.clock.now
        if now <= self._seconds:
            self._sample(now)
        following = now + 1.0
        self._simulator.clock.at(self._seconds if now < self._seconds < following else following, self._look)
        self._watch(now, self._simulator.records)

    def _sample(self, now: float) -> None:
        simulator, nodes = self._simulator, self._simulator.cluster.nodes
        self.samples.append(
            Sample(
                at_s=now,
                pulls=sum(node.store.fetches - node.store.recalls for node in nodes.values()),
                moved_bytes=simulator.cluster.links.moved_bytes,
                kept_bytes=sum(node.agent.used_bytes for node in nodes.values()),
                used_bytes=sum(node.store.used_bytes for node in nodes.values()),
            )
        )
        if simulator.cluster.coordinator is not None:
            self.table = simulator.cluster.coordinator.table
        self.busy = {name: node.busy_s / now for name, node in nodes.items()}
        if self.placed_s is None and self._is_placed(nodes):
            self.placed_s = now

    def _is_placed(self, nodes: Mapping[str, SimNode]) -> bool:
        """Return whether every adapter of the table is ready on every node that the table gives it."""
        shares = self.table.shares
        return bool(shares) and all(
            share.node in nodes and ref.digest in nodes[share.node].store.ready
            for ref, parts in shares.items()
            for share in parts
        )


def described(policy: Policy, nodes: int, hardware: Hardware, traffic: Workload, seed: int) -> SimulatorSpec:
    """Describe the run for the simulator: a policy is told the profile, the mean request and the SLO."""
    node = replace(hardware.node(policy.residency), learns=policy.learns)
    prompts = [each.call.prompt_tokens for each in traffic.arrivals]
    outputs = [each.call.output_tokens for each in traffic.arrivals]
    setting = Setting(
        model=node.model,
        slo=hardware.profile.slo,
        mean_output_tokens=sum(outputs) / max(1, len(outputs)),
        seed=seed,
        known_rates=oracle_rates(traffic.arrivals),
        mean_prompt_tokens=sum(prompts) / max(1, len(prompts)),
        limits=hardware.profile.limits,
        others=hardware.profile.models,
    )
    return SimulatorSpec(
        node=node,
        nodes=tuple(f"n{at}" for at in range(nodes)),
        adapters=traffic.adapters,
        coordinator=policy.coordinator(setting),
        router=policy.router(setting),
        faults=traffic.faults,
    )


def fitted(hardware: Hardware, traffic: Workload) -> Hardware:
    """Return the same nodes, profiled for the mean request of `traffic`."""
    lengths = mean_lengths([each.call for each in traffic.arrivals])
    return replace(hardware, profile=replace(hardware.profile, lengths=lengths))
