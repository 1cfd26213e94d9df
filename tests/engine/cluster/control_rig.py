"""A coordinator on a socket of this machine, and members whose adapters are names only."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from engine.catalogue.base import CatalogueEntry
from engine.catalogue.catalogue_file import CatalogueFile
from engine.cluster.control import broadcast, control_client, coordinator_server
from engine.cluster.control.ask_messages import Answer, Ask
from engine.cluster.control.control_client import ControlClient, CoordinatorConnection
from engine.cluster.control.control_messages import VERSION, MemberHello
from engine.cluster.control.control_values import WireEntry
from engine.cluster.control.coordinator_server import CoordinatorServer
from engine.cluster.node.agent_runner import AgentRunner
from engine.cluster.view import ClusterView
from engine.errors import InvalidAdapter
from engine.rpc.bounded_server import BoundedServer, RpcBounds
from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.coordinator.demand import DemandOptions, DemandTracker
from scheduler.cluster.coordinator.replan import Replanner, ReplanOptions
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Utilisation
from scheduler.cluster.placement.baselines import HashedPlacement
from scheduler.cluster.protocol.agent import Depart, Fetch, Free, NodeAgent
from scheduler.cluster.protocol.messages import Command, NodeHardware, RouterReport
from scheduler.cluster.state import OperatingPoints

MACHINE = NodeHardware(1 << 40, OperatingPoints((8, 64), (1000.0, 500.0)))
OPTIONS = CoordinatorOptions(settle_s=0.1, dead_after_s=30.0, retry_s=0.2, publish_s=0.01)
_WAIT_S = 60.0
_starts = itertools.count(1_800_000_000_000)


def ref_of(name: str, content: int = 0) -> AdapterRef:
    """Return the content that nodes find under a name."""
    return AdapterRef(f"{content:08x}{name.encode().hex():0>56}"[-64:], name, 8, ("q_proj",), 1 << 20)


class FakeNode:
    """Obeys at once; `folders` are the adapters that its own options declare, with a number for their content."""

    def __init__(self, name: str, folders: Mapping[str, int]) -> None:
        self.agent = NodeAgent(name, MACHINE, next(_starts))
        self.folders = dict(folders)
        self.asked: list[Ask] = []
        self.commands: list[Command] = []
        self.read: set[str] = set()
        self.is_leaving = self.may_go = False

    @property
    def session(self) -> int:
        return self.agent.session

    @property
    def held(self) -> set[str]:
        return {ref.name for ref in self.agent.report().held}

    def declared(self) -> Mapping[str, str]:
        return {
            name: ref_of(name, content).digest if name in self.read else ""
            for name, content in self.folders.items()
        }

    def obey(self, command: Command) -> None:
        self.commands.append(command)
        for action in self.agent.receive(command):
            match action:
                case Fetch(adapter=adapter):
                    self.agent.arrived(adapter)
                case Free(adapter=adapter):
                    self.agent.freed(adapter)
                case Depart():
                    self.may_go = True

    async def answer(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        if ask.act == "unload":
            self.folders.pop(ask.name, None)
            return Answer(ask.number)
        if ask.act == "load":
            if not ask.folder.startswith("/good"):
                return Answer.failed(ask.number, InvalidAdapter("it is no PEFT folder: give another"))
            self.folders[ask.name] = len(ask.folder)
        self.read.add(ask.name)
        entry = CatalogueEntry(ask.name, ref_of(ask.name, self.folders[ask.name]), ask.folder)
        return Answer(ask.number, WireEntry.of(entry))


class ControlRig:
    """Servers and members of one test; the coordinator's port stays the same when another one begins."""

    def __init__(self) -> None:
        self.port = 0
        self.server: CoordinatorServer | None = None
        self._grpc: BoundedServer | None = None
        self._clients: list[ControlClient] = []

    async def coordinator(self, registry: Path | None = None, now_s: float = 1.8e9) -> CoordinatorServer:
        """Start a coordinator."""
        self.server = CoordinatorServer(make_coordinator, CatalogueFile(registry, now_s))
        self._grpc = BoundedServer(RpcBounds(64, 5.0, 60.0, 64 << 20))
        self._grpc.add(self.server.service())
        self.port = self._grpc.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()
        await self._grpc.start()
        return self.server

    async def kill_coordinator(self) -> None:
        """Let the coordinator be gone."""
        assert self.server is not None
        assert self._grpc is not None
        await self._grpc.stop(0.0)
        await self.server.close()

    @property
    def connection(self) -> CoordinatorConnection:
        """Return how members reach the coordinator."""
        return CoordinatorConnection(self.channel)

    def channel(self) -> grpc.aio.Channel:
        """Connect to the coordinator."""
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)])

    def join(self, node: FakeNode, weights: str = "w") -> ControlClient:
        """Let a node join."""
        return self._started(
            ControlClient(_hello(node, weights), self.connection, ClusterView(), node.agent.report, node)
        )

    def join_node(self, runner: AgentRunner, view: ClusterView) -> ControlClient:
        """Let a node with a store join."""
        return self._started(ControlClient(_hello(runner, "w"), self.connection, view, runner.report, runner))

    def node(self, name: str, folders: Mapping[str, int] | None = None) -> tuple[FakeNode, ControlClient]:
        """Make a node and let it join."""
        node = FakeNode(name, folders or {})
        return node, self.join(node)

    def router(self, name: str) -> ControlClient:
        """Let a router join."""
        view, start = ClusterView(), next(_starts)

        def report() -> RouterReport:
            return RouterReport(name, view.table.version, start)

        return self._started(
            ControlClient(MemberHello(VERSION, name, "router", start), self.connection, view, report)
        )

    def _started(self, client: ControlClient) -> ControlClient:
        client.start()
        self._clients.append(client)
        return client

    async def close(self) -> None:
        """End all."""
        await asyncio.gather(*(client.close() for client in self._clients))
        await self.kill_coordinator()


def _hello(node: FakeNode | AgentRunner, weights: str) -> MemberHello:
    name = node.agent.node
    return MemberHello(VERSION, name, "node", node.session, f"{name}:1", f"{name}:2", "z", weights)


def make_coordinator(epoch: int) -> Coordinator:
    planner = Replanner(HashedPlacement(), Utilisation(Kernel.EXACT), ReplanOptions())
    return Coordinator(planner, DemandTracker(DemandOptions()), OPTIONS, epoch)


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds, as long as a test may take."""
    async with asyncio.timeout(_WAIT_S):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def control_rig() -> AsyncIterator[ControlRig]:
    """Make a rig whose parties report and tick twenty times as often as in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator_server, "_TICK_S", 0.05)
        patch.setattr(control_client, "_REPORT_S", 0.05)
        patch.setattr(control_client, "_LEAST_WAIT_S", 0.02)
        patch.setattr(control_client, "_MOST_WAIT_S", 0.2)
        patch.setattr(broadcast, "_SETTLE_S", 0.3)
        rig = ControlRig()
        try:
            yield rig
        finally:
            await rig.close()


def names_of(refs: Iterable[AdapterRef]) -> set[str]:
    """Return the names of refs."""
    return {ref.name for ref in refs}
