"""A cluster in virtual time: real schedulers, agents, front doors' policies and coordinator; simulated steps,
network, links and clients. The same spec, arrivals and seed give the same history, byte for byte.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import (
    AdapterAdded,
    Command,
    Crash,
    Drop,
    Event,
    Leave,
    Publish,
    Tick,
)
from scheduler.sim.clients import Clients
from scheduler.sim.clock import Action, Clock
from scheduler.sim.front_door import FrontDoor, Outbound
from scheduler.sim.network import CopyLinks, Network
from scheduler.sim.node import SimNode
from scheduler.sim.outcome import History, Record
from scheduler.sim.spec import Fault, FaultKind, SimulatorSpec
from scheduler.sim.workload.trace import Arrival

_COORDINATOR = ""  # its name on the network
_SECOND = 1.0


class Simulator:
    """Runs arrivals through a cluster. With `audit` everything that must hold is checked after every event,
    else once a virtual second."""

    def __init__(
        self, spec: SimulatorSpec, seed: int, audit: bool = False, keep_history: bool = False
    ) -> None:
        streams = np.random.default_rng(seed).spawn(3)
        self.clock, self.history = Clock(), History(keep_history)
        self.network = Network(self.clock, spec.times, spec.network_faults, streams[0])
        self.links = CopyLinks(self.clock, spec.speeds)
        self.nodes: dict[str, SimNode] = {}
        self._spec, self._audit = spec, audit
        self._front_doors: dict[str, FrontDoor] = {}
        self._clients = Clients(self.clock, self.history, self._front_doors, self._serves, streams[1])
        self._routing_rng = streams[2]
        self._outbound = Outbound(self.clock, self.network, self.nodes)
        self._sessions = dict.fromkeys(spec.nodes, 0)
        self._left: dict[str, None] = {}
        self._drops: dict[tuple[str, int, int], None] = {}  # those sent, to tell them from repeats
        self._epoch = 0
        self.coordinator: Coordinator | None = None
        self._begin()

    @property
    def records(self) -> Mapping[str, Record]:
        """Return what became of each request, by its name."""
        return self._clients.records

    def run(self, arrivals: Iterable[Arrival], seconds: float, drain_s: float = 600.0) -> None:
        """Let `arrivals` come and `seconds` pass, then up to `drain_s` until all is answered."""
        unanswered = self._clients.front_door_of
        self._clients.expect(iter(arrivals))
        self.clock.run(seconds, self._after_each)
        while unanswered and self.clock.now < seconds + drain_s:
            self.clock.run(self.clock.now + _SECOND, self._after_each)
        self.check()
        assert not unanswered, f"{len(unanswered)} requests were not answered in {drain_s} s after the last"

    def check(self) -> None:
        """Check what must hold after every event."""
        for node in self.nodes.values():
            if node.up:
                node.check()
        for name, home in self._clients.front_door_of.items():
            assert self.nodes[home].up, f"{name} is lost with {home}"
            assert self._front_doors[home].has(name), f"{name} is lost: {home} does not know it"

    def _serves(self, name: str) -> bool:
        """Say whether the node is up and has not left."""
        return self.nodes[name].up and name not in self._left

    def _after_each(self) -> None:
        if self._audit:
            self.check()

    def _begin(self) -> None:
        for name in self._spec.nodes:
            self._start(name)
        self._start_coordinator()
        for at, name in enumerate(self._spec.nodes):
            self._every_second(at / len(self._spec.nodes), lambda name=name: self._report(name))
        self._every_second(0.5, lambda: self._tell(Tick()))
        self._every_second(0.0, self._share_loads)
        for fault in self._spec.faults:
            self.clock.at(fault.start_s, lambda fault=fault: self._inject(fault))

    def _every_second(self, first_s: float, action: Action) -> None:
        def again() -> None:
            self.clock.after(_SECOND, again)
            action()

        self.clock.at(first_s, again)

    def _start(self, name: str) -> None:
        """Start a node with nothing, under a session of its own."""
        self._sessions[name] += 1 << 16
        agent = NodeAgent(name, self._spec.node.machine, self._sessions[name])

        def transfer(ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
            self._transfer(node, ref, sources, done)

        node = SimNode(agent, self._spec.node, self.clock, transfer)
        self.nodes[name] = node
        self._front_doors[name] = FrontDoor(
            node, self._outbound, self._spec.routing, self._routing_rng, self._clients.answer
        )

    def _transfer(self, node: SimNode, ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
        """Copy from the node's own host memory if only that is named; else from the first of `sources` that has
        it, else from the registry, also if the source is lost on the way."""
        if tuple(sources) == (node.name,):
            self.links.recall(node.name, ref.nbytes, lambda: done() if node.up else None)
            return
        source = next(
            (name for name in sources if name != node.name and self._can_give(name, node.name, ref)), None
        )
        source_node = self.nodes[source] if source is not None else None

        def arrived() -> None:
            if not node.up:
                return
            if source_node is None or (source_node.up and self.network.reaches(source_node.name, node.name)):
                done()
            else:
                self._transfer(node, ref, (), done)

        self.links.transfer(source, node.name, ref.nbytes, arrived)

    def _can_give(self, source: str, target: str, ref: AdapterRef) -> bool:
        node = self.nodes[source]
        return node.up and self.network.reaches(source, target) and node.store.can_give(ref.digest)

    def _share_loads(self) -> None:
        self._outbound.loads = {name: node.load() for name, node in self.nodes.items() if self._serves(name)}
        if not self._audit:
            self.check()

    def _report(self, name: str) -> None:
        if self._serves(name):
            report = self.nodes[name].report()
            self.network.post(name, _COORDINATOR, lambda: self._tell(report))

    def _tell(self, event: Event) -> None:
        """Hand an event to the coordinator, if there is one, and send what it commands."""
        if self.coordinator is None:
            return
        for command in self.coordinator.on_event(event, self.clock.now):
            self._check_command(command)
            self.history.note(self.clock.now, _described(command))
            for name in command.nodes if isinstance(command, Publish) else (command.node,):
                self.network.post(
                    _COORDINATOR, name, lambda name=name, command=command: self._obey(name, command)
                )

    def _check_command(self, command: Command) -> None:
        """Check that φ sums to 1 in every table, and that no drop takes a last copy."""
        assert self.coordinator is not None
        if isinstance(command, Publish):
            for ref, shares in command.table.shares.items():
                assert abs(sum(share.part for share in shares) - 1) < 1e-9, f"φ of {ref.name}: {shares}"
        if isinstance(command, Drop) and (command.node, command.session, command.number) not in self._drops:
            self._drops[command.node, command.session, command.number] = None
            held = Copy.HELD in self.coordinator.copies(command.adapter).values()
            assert held, f"{command.adapter.name} would be lost with {command.node}"

    def _obey(self, name: str, command: Command) -> None:
        node = self.nodes[name]
        if node.up and node.obey(command):
            self._left[name] = None
            self.history.note(self.clock.now, f"{name} left")

    def _start_coordinator(self) -> None:
        self.coordinator = self._spec.coordinator(self._epoch)
        self._epoch += 1
        for ref in self._spec.adapters:
            self._tell(AdapterAdded(ref))

    def _inject(self, fault: Fault) -> None:
        self.history.note(self.clock.now, f"{fault.kind.value} {' '.join(fault.nodes)} for {fault.lasts_s!r}")
        over = self._over(fault)
        match fault.kind:
            case FaultKind.CRASH:
                for name in fault.nodes:
                    self._crash(name)
            case FaultKind.PARTITION:
                self.network.cut_off = fault.nodes
                self._connections_broke()
            case FaultKind.SLOW:
                for name in fault.nodes:
                    self.nodes[name].slowdown = fault.factor
            case FaultKind.LEAVE:
                for name in fault.nodes:
                    leave = Leave(name, self.nodes[name].agent.session)
                    self.network.post(name, _COORDINATOR, lambda leave=leave: self._tell(leave))
            case FaultKind.COORDINATOR:
                self.coordinator = None
        self.clock.after(fault.lasts_s, over)

    def _over(self, fault: Fault) -> Action:
        """Return what ends the fault."""

        def end() -> None:
            for name in fault.nodes:
                if fault.kind is FaultKind.CRASH and not self.nodes[name].up:
                    self._start(name)
                if fault.kind is FaultKind.SLOW:
                    self.nodes[name].slowdown = 1.0
            if fault.kind is FaultKind.PARTITION and self.network.cut_off == fault.nodes:
                self.network.cut_off = ()
            if fault.kind is FaultKind.COORDINATOR and self.coordinator is None:
                self._start_coordinator()

        return end

    def _crash(self, name: str) -> None:
        """Kill the node with all its memory; clients of its front door see their connection break."""
        node = self.nodes[name]
        if not node.up:
            return
        node.up = False
        for request in self._front_doors[name].pending():
            self._clients.lose(request)
        crash = Crash(name, node.agent.session)
        self.clock.after(self._spec.times.detect_s, lambda: self._tell(crash))
        self._connections_broke()

    def _connections_broke(self) -> None:
        """Let front doors try again where they cannot reach, and nodes give up what nobody can hear of any
        more."""
        for home, front_door in self._front_doors.items():
            for name, node in self.nodes.items():
                if not (node.up and self.network.reaches(home, name)):
                    front_door.broke(name)
        self.clock.after(2 * self._spec.times.detect_s, self._give_up_orphans)

    def _give_up_orphans(self) -> None:
        for node in self.nodes.values():
            for job in node.jobs() if node.up else ():
                name, attempt = job.rsplit("#", 1)
                home = self._clients.front_door_of.get(name)
                if home is None or not self._front_doors[home].is_waiting(name, node.name, int(attempt)):
                    node.abort(job)


def _described(command: Command) -> str:
    if isinstance(command, Publish):
        return f"Publish {command.table.version} to {' '.join(command.nodes)}"
    return repr(command)
