"""What goes wrong in a simulated cluster, and how it ends."""

from scheduler.cluster.protocol.messages import Crash, Leave
from scheduler.sim.clients import Clients
from scheduler.sim.clock import Action, Clock
from scheduler.sim.cluster import SimCluster
from scheduler.sim.node import SimNode
from scheduler.sim.outcome import History
from scheduler.sim.spec import Fault, FaultKind


class FaultInjector:
    """Brings faults about at their times, and ends them."""

    def __init__(
        self, cluster: SimCluster, clients: Clients, clock: Clock, history: History, detect_s: float
    ) -> None:
        self._cluster, self._clients, self._clock, self._history = cluster, clients, clock, history
        self._detect_s = detect_s

    def expect(self, fault: Fault) -> None:
        """Schedule a fault."""
        self._clock.at(fault.start_s, lambda: self._inject(fault))

    def _inject(self, fault: Fault) -> None:
        self._history.note(
            self._clock.now, f"{fault.kind.value} {' '.join(fault.nodes)} for {fault.lasts_s!r}"
        )
        cluster = self._cluster
        match fault.kind:
            case FaultKind.PARTITION:
                cluster.network.cut_off = fault.nodes
                self._connections_broke()
            case FaultKind.COORDINATOR:
                cluster.coordinator = None
            case kind:
                for name in fault.nodes:
                    self._hit(kind, name, fault.factor)
        self._clock.after(fault.lasts_s, self._ending(fault))

    def _hit(self, kind: FaultKind, name: str, factor: float) -> None:
        match kind:
            case FaultKind.CRASH:
                self._crash(name)
            case FaultKind.ROUTER:
                self._crash_router(name)
            case FaultKind.SLOW:
                self._cluster.nodes[name].slowdown = factor
            case _:
                self._leave(name, returns=kind is FaultKind.RESTART)

    def _ending(self, fault: Fault) -> Action:
        """Return what ends the fault."""
        cluster = self._cluster

        def end() -> None:
            for name in fault.nodes:
                if fault.kind is FaultKind.CRASH and not cluster.nodes[name].up:
                    cluster.start_node(name)
                if fault.kind is FaultKind.ROUTER and not cluster.routers[name].up:
                    cluster.start_router(name, self._clients.hears)
                if fault.kind is FaultKind.SLOW:
                    cluster.nodes[name].slowdown = 1.0
            if fault.kind is FaultKind.PARTITION and cluster.network.cut_off == fault.nodes:
                cluster.network.cut_off = ()
            if fault.kind is FaultKind.COORDINATOR and cluster.coordinator is None:
                cluster.start_coordinator()

        return end

    def _leave(self, name: str, returns: bool) -> None:
        """Let a node ask to go; it starts anew when it is gone if it `returns`."""
        node = self._cluster.nodes[name]
        if not node.up:
            return
        node.draining = True
        if returns:
            self._cluster.restarting[name] = None
        self._cluster.post_event(name, Leave(name, node.agent.session))

    def _crash(self, name: str) -> None:
        """Kill the node with all its memory; its streams move."""
        node = self._cluster.nodes[name]
        if not node.up:
            return
        node.up = False
        self._cluster.restarting.pop(name, None)
        crash = Crash(name, node.agent.session)
        self._clock.after(self._detect_s, lambda: self._cluster.tell(crash))
        self._connections_broke()

    def _crash_router(self, name: str) -> None:
        """Kill the router; its clients see their connections break."""
        router = self._cluster.routers[name]
        if not router.up:
            return
        router.up = False
        for request in router.pending():
            self._clients.lose(request)
        self._connections_broke()

    def _connections_broke(self) -> None:
        self._cluster.connections_broke(self._is_orphaned)

    def _is_orphaned(self, node: SimNode, job: str) -> bool:
        """Return whether nobody would hear the node's answer to `job`."""
        name, attempt = job.rsplit("#", 1)
        home = self._clients.router_of.get(name)
        return home is None or not self._cluster.routers[home].is_waiting_for(name, node.name, int(attempt))
