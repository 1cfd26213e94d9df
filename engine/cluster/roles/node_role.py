"""Make a server's engine a node of a cluster: it is linked to routers, and obeys the coordinator."""

from engine.assembly.assembly import Engine
from engine.async_engine import AsyncEngine
from engine.cluster.control.control_client import ControlClient
from engine.cluster.control.control_messages import VERSION, MemberHello
from engine.cluster.link.link_server import LinkServer
from engine.cluster.link.router_stream import LinkedNode, NodeIdentity
from engine.cluster.node.agent_runner import AgentRunner
from engine.cluster.node.node_adapters import NodeAdapters
from engine.cluster.node.node_names import NodeNames
from engine.cluster.roles.role_parts import (
    KERNEL,
    connection_to,
    costs_of,
    listen_error,
    member_name,
    security_of,
    start_ms,
)
from engine.cluster.trusted_channels import MemberServer
from engine.cluster.view import ClusterView
from engine.config.config import ServeConfig
from engine.live.node_load import NodeJobs, NodeRoom
from engine.runner.step_costs import StepCosts
from lora.adapter import AdapterRef
from lora.format.allowed_roots import AllowedRoots
from lora.sources.source_url import AdapterSource
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.state import OperatingPoints
from transport.base import Address
from transport.errors import HelloRefused

_RANKS = (8, 16, 32, 64, 128)
_ANY_PORT = Address("127.0.0.1", 0)
_LEAVE_S = 5.0  # for the coordinator to let the node go


class NodeRole:
    """What a node has beside its engine. Used on one event loop."""

    def __init__(self, config: ServeConfig, engine: Engine, front: AsyncEngine, weights: str) -> None:
        """Join nobody yet; to be made before the engine's first step. Raises InvalidConfig."""
        self.view = ClusterView()
        self._config, self._engine, self._front, self._weights = config, engine, front, weights
        self._security = security_of(config)
        self._profiled = costs_of(config)
        most_rows = config.engine.max_num_batched_tokens
        self._costs = StepCosts((self._profiled.model,), config.cluster.slo.tbt_s, most_rows)
        engine.core.costs = self._costs
        self._listen = config.cluster.cluster_listen or _ANY_PORT
        self._link: LinkServer | None = None
        self._server: MemberServer | None = None
        self._control: ControlClient | None = None
        self._runner: AgentRunner | None = None
        self._adapters: NodeAdapters | None = None

    async def start(self) -> None:
        """Listen to routers, and look for the coordinator. Raises InvalidConfig."""
        config, engine, session = self._config, self._engine, start_ms()
        cluster, card = config.cluster, engine.card
        assert cluster.coordinator is not None, "ClusterConfig demands it of a node"
        name = member_name(config, "node", self._listen.port or session)
        self._front.catalogue.hand_over(name)
        placed, contents = engine.store.kept, engine.store.contents
        agent = NodeAgent(name, self._hardware(), session)
        pushed = () if config.lora_push_dir is None else (config.lora_push_dir,)
        roots = AllowedRoots.below((*config.lora_roots, *pushed))

        async def load(adapter: str, folder: AdapterSource, replaces: bool) -> AdapterRef:
            return await self._front.load_adapter(adapter, folder, replaces, roots)

        names = NodeNames(engine.store.registry, load, self._front.unload_adapter)
        runner = AgentRunner(agent, placed, contents.retained, names, self.view, self._costs)
        placed.tell(runner.arrived, runner.displaced, runner.failed)
        room = NodeRoom(config.engine.max_num_seqs, config.max_waiting, config.engine.block_size)
        jobs = NodeJobs(engine.core, self._costs, room, placed.room_bytes, session)
        self._front.linked_names = jobs.names_by_state
        adapters = NodeAdapters(engine.store.registry, self.view, name, placed)
        identity = NodeIdentity(
            name, session, card.max_model_len, card.vocab_size, card.eos_token_ids, self._weights
        )
        node = LinkedNode(identity, self._front.step_loop, jobs, adapters, runner, self._front.grammars)
        link = LinkServer(node)
        server = MemberServer(self._security, [link.service()])
        try:
            address = await server.start(self._listen)
        except (OSError, HelloRefused) as error:
            raise listen_error("cluster_listen", self._listen, error) from error
        await link.start()
        hello = MemberHello(
            VERSION, name, "node", session, str(address), self._front.peer_address or "", cluster.zone or "",
            self._weights, profile=self._profiled.digest,
        )  # fmt: skip
        connection = connection_to(cluster.coordinator, self._security)
        control = ControlClient(hello, connection, self.view, runner.report, runner)
        control.start()
        self._link, self._server, self._control = link, server, control
        self._runner, self._adapters = runner, adapters

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and wait for what runs; what is not done after `timeout_s` moves to other nodes."""
        if self._link is None or self._runner is None:
            return
        self._link.drain()
        await self._link.drained(timeout_s)
        await self._runner.leave(min(timeout_s, _LEAVE_S))

    async def close(self) -> None:
        """End all links, and leave."""
        if self._link is not None:
            await self._link.close()
        if self._control is not None:
            await self._control.close()
        if self._server is not None:
            await self._server.close()
        if self._runner is not None:
            await self._runner.close()
        if self._adapters is not None:
            self._adapters.close()

    def _hardware(self) -> NodeHardware:
        stats = self._engine.store.stats()
        points: OperatingPoints = self._profiled.profile.operating_points(KERNEL, _RANKS)
        nbytes = stats.total_pages * self._engine.store.page_bytes
        return NodeHardware(nbytes, points, self._config.cluster.zone or "")
