"""Nodes and a router of the embedded model in one process, linked over real sockets."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from engine.assembly.assembly import Engine, assemble
from engine.async_engine import AsyncEngine
from engine.base.model_card import ModelCard
from engine.catalogue.base import CatalogueEntry
from engine.cluster.control.ask_messages import Answer, Ask
from engine.cluster.control.control_client import AskedMember
from engine.cluster.control.coordinator_asks import CoordinatorAsks
from engine.cluster.link.link_messages import VERSION, OpenLink
from engine.cluster.link.link_server import LinkServer
from engine.cluster.link.router_stream import LinkedNode, NodeIdentity
from engine.cluster.node.node_adapters import NodeAdapters
from engine.cluster.router.cluster_client import ClusterClient
from engine.cluster.router.forwarding import Forwarding
from engine.cluster.trusted_channels import MemberServer
from engine.cluster.view import ClusterView, Member, ServedModel
from engine.config.config import EngineConfig
from engine.live.node_load import NodeJobs, NodeRoom
from engine.metrics.telemetry import Telemetry
from engine.runner.step_costs import StepCosts
from engine.tokenizer import Tokenizer
from lora.adapter import AdapterRef
from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.policies import OURS, Setting
from tests.scheduler.cluster.test_routing import MODEL
from transport.base import Address
from transport.control.security import Security

T = TypeVar("T")
TIMEOUT_S = 120.0  # for machines that are busy
TASKS = ("reverse", "sort", "rot13", "upper")
SECURITY = Security("a token of sixteen")
WEIGHTS = "0" * 64
SLO = Slo(20.0, 5.0)  # machines that test are slow


class Took:
    """A NodeWatcher that sums up."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def took(self, ref: AdapterRef, tokens: int) -> None:
        """Add tokens of an adapter."""
        self.tokens[ref.name] = self.tokens.get(ref.name, 0) + tokens


@dataclass(slots=True)
class LiveNode:
    """A node of the embedded model."""

    name: str
    engine: Engine
    front: AsyncEngine
    link: LinkServer
    server: MemberServer
    watcher: Took = field(default_factory=Took)
    member: Member | None = None

    @classmethod
    def make(cls, name: str, config: EngineConfig | None = None) -> "LiveNode":
        """Assemble one that is not started."""
        config = config or EngineConfig(
            dtype="float32", kv_cache_bytes=32 << 20, progress=False, self_test=False
        )
        engine = assemble(config)
        front, costs = AsyncEngine(engine, Telemetry(), 256), StepCosts((MODEL,), None, 2048)
        engine.core.costs = costs
        session, card = int(time.time() * 1000), engine.card
        room = NodeRoom(config.max_num_seqs, 256, config.block_size)
        jobs = NodeJobs(engine.core, costs, room, lambda: float("inf"), session)
        adapters, watcher = NodeAdapters(engine.store.registry, ClusterView(), name, None), Took()
        identity = NodeIdentity(
            name, session, card.max_model_len, card.vocab_size, card.eos_token_ids, WEIGHTS
        )
        link = LinkServer(LinkedNode(identity, front.step_loop, jobs, adapters, watcher, front.grammars))
        return cls(name, engine, front, link, MemberServer(SECURITY, [link.service()]), watcher)

    async def start(self) -> Member:
        """Listen; return who it is."""
        await self.front.start()
        await self.link.start()
        address = await self.server.start(Address("127.0.0.1", 0))
        self.member = Member(self.name, self.link.identity.session, str(address))
        return self.member

    async def stop(self) -> None:
        """End at once: streams break."""
        await self.link.close()
        await self.server.close()
        await self.front.close()


class AloneAsks(CoordinatorAsks):
    """The coordinator of one router, which holds and aborts there."""

    def __init__(self) -> None:
        super().__init__()
        self.router: AskedMember | None = None

    async def hold(self, name: str, seconds: float) -> None:
        await self._told(Ask(1, "hold", name, seconds=seconds))

    async def abort(self, name: str) -> int:
        return (await self._told(Ask(1, "abort", name))).aborted

    async def _told(self, ask: Ask) -> Answer:
        assert self.router is not None
        return await self.router.answer(ask)


def make_router(view: ClusterView, engine: Engine) -> ClusterClient:
    """Make a router over the nodes of `view`; the engine lends its card only."""
    asks = AloneAsks()
    client = router_of(view, engine.card, engine.tokenizer, asks)
    asks.router = client.catalogue
    return client


def router_of(
    view: ClusterView, card: ModelCard, tokenizer: Tokenizer, asks: CoordinatorAsks
) -> ClusterClient:
    """Make a router over the nodes of `view` that asks its coordinator by `asks`."""
    setting = Setting(MODEL, SLO, mean_output_tokens=32, mean_prompt_tokens=64)
    router = OURS.router(setting)(np.random.default_rng(0))
    hello = OpenLink(VERSION, "router", int(time.time() * 1000))
    forwarding = Forwarding(
        router, hello, SECURITY, ServedModel(card.max_model_len, card.vocab_size, WEIGHTS)
    )
    return ClusterClient(card, tokenizer, Telemetry(), forwarding, view, asks, 256, SLO.ttft_s)


def with_router(visit: Callable[[ClusterClient, list[LiveNode]], Awaitable[T]], nodes: int = 2) -> T:
    """Start nodes and a router, and see what is true of them; nothing may be left on any."""

    async def session() -> T:
        live = [LiveNode.make(f"n{at}") for at in range(nodes)]
        members = [await node.start() for node in live]
        refs: dict[str, AdapterRef] = {name: live[0].engine.store.registry.resolve(name) for name in TASKS}
        view = ClusterView(
            {member.name: member for member in members},
            {name: CatalogueEntry(name, ref) for name, ref in refs.items()},
            known=True,
        )
        client = make_router(view, live[0].engine)
        await client.start()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while len(client.forwarding.ready) < nodes:
                    await asyncio.sleep(0.01)
            found = await asyncio.wait_for(visit(client, live), TIMEOUT_S)
            assert len(client.forwarding) == client.forwarding.router.waiting == 0
            for node in live:
                await node.link.drained(5.0)
                assert node.engine.core.num_live_requests == 0
            return found
        finally:
            await client.close()
            for node in live:
                await node.stop()

    return asyncio.run(session())
