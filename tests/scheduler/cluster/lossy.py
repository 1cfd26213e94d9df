"""A cluster on a network that loses, doubles, delays and reorders, with nodes that keep the protocol. What it knows of
the truth (who really has what) is the oracle for what the coordinator believes."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.coordinator.demand import DemandOptions, DemandTracker
from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.coordinator.replan import Replanner, ReplanOptions
from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.cluster.cost.profile import Lengths
from scheduler.cluster.placement.balanced import BalancedPlacement, StepMeasure
from scheduler.cluster.placement.base import PlacementPolicy
from scheduler.cluster.protocol.agent import Action, Fetch, Free, NodeAgent
from scheduler.cluster.protocol.messages import (
    AdapterAdded,
    AdapterDeleted,
    Command,
    Crash,
    Drop,
    Event,
    Leave,
    NodeHardware,
    Publish,
    Report,
    Tick,
)
from scheduler.cluster.state import OperatingPoints, Placement

MIB = 2**20
POINTS = OperatingPoints((8, 16, 32, 64, 128), (26000.0, 24000.0, 21000.0, 16500.0, 11600.0))
MODEL = CostModel(Kernel.PADDED, 5.3e-3, 25e-6, 5e-6, 4.4e-8, 1.75e-6, 8.7e-9)
FORECAST = Forecast(MODEL, Lengths(1024, 256))


def adapter(name: str, rank: int = 8) -> AdapterRef:
    """An adapter of 1 MiB for each rank row."""
    return AdapterRef(digest=f"digest of {name}", name=name, rank=rank, sites=("q_proj",), nbytes=rank * MIB)


def held_by(placement: Placement, node: str) -> tuple[AdapterRef, ...]:
    """The adapters that `placement` puts on `node`."""
    return tuple(ref for ref, shares in placement.shares.items() if any(s.node == node for s in shares))


def make_coordinator(policy: PlacementPolicy | None = None, epoch: int = 0) -> Coordinator:
    """One with windows and plans short enough for tests."""
    policy = policy or BalancedPlacement(FORECAST)
    planner = Replanner(policy, StepMeasure(FORECAST, 0.05), ReplanOptions(interval_s=3.0, comfort=0.25))
    return Coordinator(planner, DemandTracker(DemandOptions(window_s=2.0)), CoordinatorOptions(), epoch)


@dataclass
class LossyCluster:
    """`network` holds messages in flight, (receiver, message), an event's receiver being ""."""

    memory_bytes: int
    coordinator: Coordinator = field(default_factory=make_coordinator)
    now: float = 0.0
    epoch: int = 0
    agents: dict[str, NodeAgent] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    network: list[tuple[str, Event | Command]] = field(default_factory=list)
    fetches: list[tuple[str, AdapterRef]] = field(default_factory=list)
    frees: list[tuple[str, AdapterRef]] = field(default_factory=list)
    registered: dict[AdapterRef, None] = field(default_factory=dict)
    excused: dict[AdapterRef, None] = field(
        default_factory=dict
    )  # copies of these were lost with their nodes
    drops: dict[tuple[str, int, int], None] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)
    departed: list[str] = field(default_factory=list)
    leaving: dict[str, float] = field(default_factory=dict)  # since when

    def start(self, node: str) -> None:
        """A node starts, or starts anew with nothing."""
        self.sessions[node] = self.sessions.get(node, 0) + 100
        zone = f"zone {len(node) % 2}"
        self.agents[node] = NodeAgent(
            node, NodeHardware(self.memory_bytes, POINTS, zone), self.sessions[node]
        )

    def report(self, node: str, slowdown: float = 1.0) -> None:
        if node in self.agents:
            self.network.append(("", self.agents[node].report(slowdown)))

    def crash(self, node: str, noticed: bool) -> None:
        agent = self.agents.pop(node, None)
        if agent is None:
            return
        self.leaving.pop(node, None)
        self.excused.update((ref, None) for ref in self.registered if agent.has(ref))
        self.fetches = [fetch for fetch in self.fetches if fetch[0] != node]
        self.frees = [free for free in self.frees if free[0] != node]
        if noticed:
            self.network.append(("", Crash(node, agent.session)))

    def leave(self, node: str) -> None:
        if node in self.agents:
            self.leaving.setdefault(node, self.now)
            self.network.append(("", Leave(node, self.agents[node].session)))

    def add(self, ref: AdapterRef) -> None:
        self.registered[ref] = None
        self.tell(AdapterAdded(ref))

    def delete(self, ref: AdapterRef) -> None:
        if self.registered.pop(ref, self) is None:
            self.excused[ref] = None
            self.tell(AdapterDeleted(ref))

    def fail_over(self) -> None:
        """The coordinator dies and a new one takes its place, knowing nothing but the registry."""
        self.epoch += 1
        self.drops.clear()
        self.coordinator = make_coordinator(epoch=self.epoch)
        for ref in self.registered:
            self.tell(AdapterAdded(ref))

    def tell(self, event: Event) -> list[Command]:
        """Hand one event to the coordinator, put its commands on the network and check all that must ever hold."""
        commands = self.coordinator.on_event(event, self.now)
        for command in commands:
            if isinstance(command, Publish):
                fresh = not self.published or command.table.version != self.published[-1]
                assert not fresh or command.table.version > max(self.published, default=0), (
                    "versions increase"
                )
                self.published.append(command.table.version)
                self.network += [(node, command) for node in command.nodes]
            else:
                self.network.append((command.node, command))
            if (
                isinstance(command, Drop)
                and (command.node, command.session, command.number) not in self.drops
            ):
                self.drops[command.node, command.session, command.number] = None
                self.check_drop(command)
        self.check()
        return commands

    def deliver(self, at: int, keep: bool = False) -> None:
        """Deliver the message at `at`; `keep` leaves a double of it on the network."""
        receiver, message = self.network[at] if keep else self.network.pop(at)
        if isinstance(message, Report | Crash | Leave):
            self.tell(message)
        elif receiver in self.agents:
            assert not isinstance(message, AdapterAdded | AdapterDeleted | Tick)
            self._do(receiver, self.agents[receiver].receive(message))

    def arrive(self, at: int) -> None:
        node, ref = self.fetches.pop(at)
        self.agents[node].arrived(ref)

    def free(self, at: int) -> None:
        """A drained adapter is freed, if it is still to be."""
        node, ref = self.frees.pop(at)
        agent = self.agents[node]
        if agent.has(ref) and not agent.keeps(ref):
            others = (other for name, other in self.agents.items() if name != node)
            lone = ref in self.registered and not any(other.keeps(ref) for other in others)
            assert not lone or ref in self.excused, f"{ref.name} lost its last copy on {node}"
            agent.freed(ref)

    def settle(self, rounds: int) -> int:
        """Let `rounds` quiet seconds pass on a good network; returns for how many at the end no command was sent."""
        silent = 0
        for _ in range(rounds):
            self.now += 1.0
            for node in list(self.agents):
                self.report(node)
            sent = len(self.tell(Tick()))
            while self.network or self.fetches or self.frees:
                sent += sum(receiver != "" for receiver, _ in self.network)
                for _ in range(len(self.network)):
                    self.deliver(0)
                while self.fetches:
                    self.arrive(0)
                while self.frees:
                    self.free(0)
            silent = 0 if sent else silent + 1
        return silent

    def check(self) -> None:
        """What must hold after every event."""
        for node, agent in self.agents.items():
            used = agent.used_bytes
            assert used <= self.memory_bytes, f"{node} holds {used} of {self.memory_bytes} bytes"
        for ref, shares in self.coordinator.table.shares.items():
            assert abs(sum(share.part for share in shares) - 1) < 1e-9, f"φ of {ref.name}: {shares}"
            assert all(0 < share.part <= 1 for share in shares)
        self.check_beliefs()

    def check_beliefs(self) -> None:
        """A copy believed held is held: reports come late, but are believed only as far as they can be true."""
        for ref in self.registered:
            for node, copy in self.coordinator.copies(ref).items():
                agent = self.agents.get(node)
                if copy is Copy.HELD and agent and agent.session == self.coordinator.session(node):
                    assert agent.keeps(ref), f"{ref.name} is not on {node}"

    def check_drop(self, drop: Drop) -> None:
        """Nobody routes there any more, and there is another copy."""
        agent, ref = self.agents.get(drop.node), drop.adapter
        if ref not in self.registered or agent is None or not agent.keeps(ref):
            return
        assert Copy.HELD in self.coordinator.copies(ref).values(), (
            f"{ref.name} would be lost with {drop.node}"
        )
        for node, other in self.agents.items():
            if other.session == self.coordinator.session(node):
                shares = other.table.shares.get(ref, ())
                assert all(share.node != drop.node for share in shares), (
                    f"{node} routes {ref.name} to {drop.node}"
                )

    def check_routes(self) -> None:
        """What must hold whenever the table is up to date with what is believed."""
        for ref in self.registered:
            copies = self.coordinator.copies(ref)
            shares = self.coordinator.table.shares.get(ref, ())
            held = [node for node, copy in copies.items() if copy is Copy.HELD]
            for share in shares:
                assert not held or copies.get(share.node) in (Copy.HELD, Copy.PULLING), (
                    f"{ref.name}: {shares}"
                )

    def _do(self, node: str, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Fetch(adapter=ref):
                    self.fetches.append((node, ref))
                case Free(adapter=ref):
                    self.frees.append((node, ref))
                case _:
                    self.departed.append(node)
                    self._depart(node)

    def _depart(self, node: str) -> None:
        agent = self.agents.pop(node)
        in_time = self.now - self.leaving.pop(node) < CoordinatorOptions().leave_s
        self.fetches = [fetch for fetch in self.fetches if fetch[0] != node]
        self.frees = [free for free in self.frees if free[0] != node]
        for ref in self.registered:
            others = any(other.keeps(ref) for other in self.agents.values())
            kept = not agent.keeps(ref) or others or ref in self.excused
            assert kept or not in_time, f"{ref.name} left with {node}"
            if not kept:
                self.excused[ref] = None
