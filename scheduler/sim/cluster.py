"""The parties of a simulated cluster, and the messages between them: nodes, routers and the coordinator."""

from collections.abc import Callable, Sequence

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
    Publish,
    Tick,
)
from scheduler.sim.clock import Action, Clock
from scheduler.sim.network import CopyLinks, Network
from scheduler.sim.node import Listener, News, SimNode
from scheduler.sim.outcome import History
from scheduler.sim.sim_router import Answer, RefuseClient, SimRouter
from scheduler.sim.spec import SimulatorSpec

_COORDINATOR = ""  # its name on the network
_SECOND = 1.0

AnswerClient = tuple[Answer, RefuseClient]


class SimCluster:
    """Owner of the parties. Each has a name; whoever starts anew knows nothing of what it was before."""

    def __init__(
        self,
        spec: SimulatorSpec,
        clock: Clock,
        history: History,
        rngs: tuple[np.random.Generator, np.random.Generator],
    ) -> None:
        """Start nothing yet; `rngs` are of the network and of the routers."""
        self.network = Network(clock, spec.times, spec.network_faults, rngs[0])
        self.links = CopyLinks(clock, spec.speeds)
        self.nodes: dict[str, SimNode] = {}
        self.routers: dict[str, SimRouter] = {}
        self.coordinator: Coordinator | None = None
        self.restarting: dict[str, None] = {}  # nodes that start anew when they have left
        self._spec, self._clock, self._history, self._routing_rng = spec, clock, history, rngs[1]
        self._sessions = dict.fromkeys(spec.nodes, 0)
        self._drops: dict[tuple[str, int, int], None] = {}  # those sent, to tell them from repeats
        self._epoch = 0

    def begin(self, clients: AnswerClient) -> None:
        """Start everyone, and what they do again and again."""
        spec = self._spec
        for name in spec.routers:
            self.start_router(name, clients)
        for name in spec.nodes:
            self.start_node(name)
        self.start_coordinator()
        for at, name in enumerate(spec.nodes):
            part = at / len(spec.nodes)
            self.every(_SECOND, part, lambda name=name: self._report(name))
            self.every(spec.load_s, part * spec.load_s, lambda name=name: self._tell_load(name))
        for at, name in enumerate(spec.routers):
            self.every(_SECOND, at / len(spec.routers), lambda name=name: self._report_router(name))
        self.every(_SECOND, 0.5, lambda: self.tell(Tick()))

    def every(self, seconds: float, first_s: float, action: Action) -> None:
        """Do it at `first_s`, and every `seconds` after that."""

        def again() -> None:
            self._clock.after(seconds, again)
            action()

        self._clock.at(first_s, again)

    def start_node(self, name: str) -> None:
        """Start a node with nothing, under a session of its own."""
        self._sessions[name] += 1 << 16
        agent = NodeAgent(name, self._spec.node.machine, self._sessions[name])

        def transfer(ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
            self._transfer(node, ref, sources, done)

        node = SimNode(agent, self._spec.node, self._clock, transfer, self._tell_news)
        self.nodes[name] = node

    def start_router(self, name: str, clients: AnswerClient) -> None:
        """Start a router that knows nothing."""
        decisions = self._spec.router(self._routing_rng)
        session = int(self._clock.now * 1000)
        self.routers[name] = SimRouter(
            name, decisions, self._clock, self.network, self.nodes, *clients, session=session
        )

    def start_coordinator(self) -> None:
        """Start a coordinator that knows the registry only."""
        self.coordinator = self._spec.coordinator(self._epoch)
        self._epoch += 1
        for ref in self._spec.adapters:
            self.tell(AdapterAdded(ref))

    def tell(self, event: Event) -> None:
        """Hand an event to the coordinator, if there is one, and send what it commands."""
        if self.coordinator is None:
            return
        for command in self.coordinator.on_event(event, self._clock.now):
            self._check_command(command)
            self._history.note(self._clock.now, _described(command))
            if isinstance(command, Publish):
                self._publish(command)
            else:
                self._command(command.node, command)

    def post_event(self, sender: str, event: Event) -> None:
        """Send an event to the coordinator."""
        self.network.post(sender, _COORDINATOR, lambda: self.tell(event))

    def connections_broke(self, orphaned: Callable[[SimNode, str], bool]) -> None:
        """Let routers learn, after a while, whom they cannot reach; nodes give up the `orphaned` jobs later still."""
        detect_s = self._spec.times.detect_s
        for router in self.routers.values():
            for node in self.nodes.values():
                if not (node.up and self.network.reaches(router.name, node.name)):
                    self._clock.after(detect_s, lambda router=router, node=node: self._lose(router, node))

        def give_up() -> None:
            for node in self.nodes.values():
                for job in node.jobs() if node.up else ():
                    if orphaned(node, job):
                        node.abort(job)

        self._clock.after(2 * detect_s, give_up)

    def _lose(self, router: SimRouter, node: SimNode) -> None:
        """Let `router` see that its connection to this start of the node broke."""
        is_whole = node.up and self.network.reaches(router.name, node.name)
        if not is_whole:  # else the cut was shorter than it takes to notice
            router.lose(node.name)

    def _tell_news(self, node: SimNode, listener: Listener, news: Sequence[News]) -> None:
        """Send news; what cannot be delivered breaks the connection, however short the cut."""

        def broken() -> None:
            listener.lose(node.name)
            for job, _ in news if node.up else ():
                node.abort(job)

        self.network.call(
            (node.name, listener.name),
            lambda: listener.up,
            lambda: listener.hear(node.name, news),
            broken,
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

    def _tell_load(self, name: str) -> None:
        """Post the node's load to every router."""
        node = self.nodes[name]
        if not node.up:
            return
        load = node.load()
        for router, listener in self.routers.items():
            told = node.load_for(listener, load)
            self.network.post(
                name, router, lambda router=router, told=told: self.routers[router].hear_load(name, told)
            )

    def _report(self, name: str) -> None:
        if self.nodes[name].up:
            self.post_event(name, self.nodes[name].report())

    def _report_router(self, name: str) -> None:
        router = self.routers[name]
        if router.up:
            self.post_event(name, router.report())

    def _publish(self, command: Publish) -> None:
        for name in command.nodes:
            self._command(name, command)
        for name in command.routers:
            self.network.post(_COORDINATOR, name, lambda name=name: self.routers[name].adopt(command.table))

    def _command(self, name: str, command: Command) -> None:
        self.network.post(_COORDINATOR, name, lambda: self._obey(name, command))

    def _obey(self, name: str, command: Command) -> None:
        node = self.nodes[name]
        if node.up and node.obey(command):
            self._history.note(self._clock.now, f"{name} may leave")
            self._drain(node, self._clock.now + self._spec.drain_s)

    def _drain(self, node: SimNode, until_s: float) -> None:
        """Let the node go when its streams have ended, or at `until_s`: the rest of them move."""
        if not node.up:
            return
        if node.jobs() and self._clock.now < until_s:
            self._clock.after(self._spec.load_s, lambda: self._drain(node, until_s))
            return
        self._history.note(self._clock.now, f"{node.name} left")
        node.up = False
        for router in self.routers.values():
            router.lose(node.name)  # it says so
        self.tell(Crash(node.name, node.agent.session))
        if node.name in self.restarting:
            del self.restarting[node.name]
            self.start_node(node.name)

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


def _described(command: Command) -> str:
    if isinstance(command, Publish):
        return f"Publish {command.table.version} to {' '.join((*command.nodes, *command.routers))}"
    return repr(command)
