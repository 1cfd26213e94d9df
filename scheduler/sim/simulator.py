"""A cluster in virtual time: real schedulers, agents, routers' decisions and coordinator; simulated steps,
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
    RouterReport,
    Tick,
)
from scheduler.sim.clients import Clients
from scheduler.sim.clock import Action, Clock
from scheduler.sim.network import CopyLinks, Network
from scheduler.sim.node import Listener, News, SimNode
from scheduler.sim.outcome import History, Record
from scheduler.sim.router import SimRouter
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
        self.routers: dict[str, SimRouter] = {}
        self._clients = Clients(self.clock, self.history, self.routers, streams[1])
        self._routing_rng = streams[2]
        self._sessions = dict.fromkeys(spec.nodes, 0)
        self._left: dict[str, None] = {}
        self._restarting: dict[str, None] = {}
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
        unanswered = self._clients.router_of
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
        for name, home in self._clients.router_of.items():
            assert self.routers[home].up, f"{name} is lost with {home}"
            assert self.routers[home].has(name), f"{name} is lost: {home} does not know it"

    def _serves(self, name: str) -> bool:
        """Say whether the node is up and has not left."""
        return self.nodes[name].up and name not in self._left

    def _after_each(self) -> None:
        if self._audit:
            self.check()

    def _begin(self) -> None:
        spec = self._spec
        for name in spec.routers:
            self._start_router(name)
        for name in spec.nodes:
            self._start(name)
        self._start_coordinator()
        for at, name in enumerate(spec.nodes):
            part = at / len(spec.nodes)
            self._every(_SECOND, part, lambda name=name: self._report(name))
            self._every(spec.load_s, part * spec.load_s, lambda name=name: self._tell_load(name))
        for at, name in enumerate(spec.routers):
            self._every(_SECOND, at / len(spec.routers), lambda name=name: self._report_router(name))
        self._every(_SECOND, 0.5, lambda: self._tell(Tick()))
        if not self._audit:
            self._every(_SECOND, 0.0, self.check)
        for fault in self._spec.faults:
            self.clock.at(fault.start_s, lambda fault=fault: self._inject(fault))

    def _every(self, seconds: float, first_s: float, action: Action) -> None:
        def again() -> None:
            self.clock.after(seconds, again)
            action()

        self.clock.at(first_s, again)

    def _start(self, name: str) -> None:
        """Start a node with nothing, under a session of its own."""
        self._sessions[name] += 1 << 16
        agent = NodeAgent(name, self._spec.node.machine, self._sessions[name])

        def transfer(ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
            self._transfer(node, ref, sources, done)

        node = SimNode(agent, self._spec.node, self.clock, transfer, self._tell_news)
        self.nodes[name] = node
        self._left.pop(name, None)

    def _start_router(self, name: str) -> None:
        """Start a router that knows nothing."""
        self.routers[name] = SimRouter(
            name,
            self._spec.router(self._routing_rng),
            self.clock,
            self.network,
            self.nodes,
            self._clients.answer,
            self._clients.refuse,
        )

    def _tell_news(self, node: SimNode, listener: Listener, news: Sequence[News]) -> None:
        self.network.call(
            (node.name, listener.name),
            lambda: listener.up,
            lambda: listener.hear(node.name, news),
            lambda: None,
        )

    def _transfer(self, node: SimNode, ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
        """Copy from the first of `sources` that has it, else from the registry, also if the source is lost on
        the way."""
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
        return node.up and self.network.reaches(source, target) and ref.digest in node.store.ready

    def _tell_load(self, name: str) -> None:
        """Post the node's load to every router."""
        node = self.nodes[name]
        if not node.up or name in self._left:
            return
        load = node.load()
        for router_name in self.routers:
            told = node.load_for(router_name, load)
            self.network.post(
                name,
                router_name,
                lambda router_name=router_name, told=told: self.routers[router_name].hear_load(name, told),
            )

    def _report_router(self, name: str) -> None:
        router = self.routers[name]
        if router.up:
            report = RouterReport(name, router.router.table.version)
            self.network.post(name, _COORDINATOR, lambda: self._tell(report))

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
            if isinstance(command, Publish):
                self._publish(command)
            for name in command.nodes if isinstance(command, Publish) else (command.node,):
                self.network.post(
                    _COORDINATOR, name, lambda name=name, command=command: self._obey(name, command)
                )

    def _publish(self, command: Publish) -> None:
        """Post a table to the routers."""
        for name in command.routers:
            self.network.post(_COORDINATOR, name, lambda name=name: self.routers[name].adopt(command.table))

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
            self.history.note(self.clock.now, f"{name} may leave")
            self._drain(node, self.clock.now + self._spec.drain_s)

    def _drain(self, node: SimNode, until_s: float) -> None:
        """Let the node go when its streams have ended, or at `until_s`, from when on they move."""
        if node.up and self.nodes[node.name] is node:
            if node.jobs() and self.clock.now < until_s:
                self.clock.after(self._spec.load_s, lambda: self._drain(node, until_s))
            else:
                self._go(node)

    def _go(self, node: SimNode) -> None:
        self.history.note(self.clock.now, f"{node.name} left")
        self._left[node.name] = None
        node.up = False
        self._tell(Crash(node.name, node.agent.session))
        self._connections_broke()
        if node.name in self._restarting:
            del self._restarting[node.name]
            self._start(node.name)

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
            case FaultKind.ROUTER:
                for name in fault.nodes:
                    self._crash_router(name)
            case FaultKind.LEAVE | FaultKind.RESTART:
                for name in fault.nodes:
                    if fault.kind is FaultKind.RESTART:
                        self._restarting[name] = None
                    self.nodes[name].draining = True
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
                if fault.kind is FaultKind.ROUTER and not self.routers[name].up:
                    self._start_router(name)
                if fault.kind is FaultKind.SLOW:
                    self.nodes[name].slowdown = 1.0
            if fault.kind is FaultKind.PARTITION and self.network.cut_off == fault.nodes:
                self.network.cut_off = ()
            if fault.kind is FaultKind.COORDINATOR and self.coordinator is None:
                self._start_coordinator()

        return end

    def _crash(self, name: str) -> None:
        """Kill the node with all its memory; its streams move."""
        node = self.nodes[name]
        if not node.up:
            return
        node.up = False
        self._restarting.pop(name, None)
        crash = Crash(name, node.agent.session)
        self.clock.after(self._spec.times.detect_s, lambda: self._tell(crash))
        self._connections_broke()

    def _crash_router(self, name: str) -> None:
        """Kill the router; its clients see their connections break."""
        router = self.routers[name]
        if not router.up:
            return
        router.up = False
        for request in router.pending():
            self._clients.lose(request)
        self._connections_broke()

    def _connections_broke(self) -> None:
        """Let routers know, after a while, whom they cannot reach, and nodes give up what nobody can hear of any
        more."""
        for router in self.routers.values():
            for node in self.nodes.values():
                if not (node.up and self.network.reaches(router.name, node.name)):
                    self.clock.after(
                        self._spec.times.detect_s, lambda router=router, node=node: self._lose(router, node)
                    )
        self.clock.after(2 * self._spec.times.detect_s, self._give_up_orphans)

    def _lose(self, router: SimRouter, node: SimNode) -> None:
        """Let `router` see that its connection to that start of the node broke."""
        if self.nodes[node.name] is node and node.up and self.network.reaches(router.name, node.name):
            return  # the cut was shorter than it takes to notice
        router.lose(node.name)

    def _give_up_orphans(self) -> None:
        for node in self.nodes.values():
            for job in node.jobs() if node.up else ():
                name, attempt = job.rsplit("#", 1)
                home = self._clients.router_of.get(name)
                if home is None or not self.routers[home].is_waiting_for(name, node.name, int(attempt)):
                    node.abort(job)


def _described(command: Command) -> str:
    if isinstance(command, Publish):
        return f"Publish {command.table.version} to {' '.join(command.nodes)}"
    return repr(command)
