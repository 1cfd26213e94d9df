"""Make a router: the model's tokenizer and card without its weights, links to nodes, and a way to the coordinator."""

import asyncio
from contextlib import suppress

import numpy as np

from engine.assembly.assembly import base_names
from engine.assembly.tokenizer_loading import load_tokenizer
from engine.base.base_model import choose_base
from engine.cluster.control.control_client import ControlClient
from engine.cluster.control.control_messages import VERSION, MemberHello
from engine.cluster.link.link_messages import VERSION as LINK_VERSION
from engine.cluster.link.link_messages import OpenLink
from engine.cluster.roles.role_parts import (
    connection_to,
    costs_of,
    member_name,
    security_of,
    start_ms,
)
from engine.cluster.router.cluster_client import ClusterClient, RoutedModel
from engine.cluster.router.forwarding import Forwarding
from engine.cluster.view import ClusterView, ServedModel
from engine.config.config import ServeConfig
from engine.metrics.telemetry import Telemetry
from model.checkpoint import weights_digest
from scheduler.cluster.policies import POLICIES
from scheduler.cluster.protocol.messages import RouterReport

_SETTLE_S, _POLL_S = 15.0, 0.05


class RouterRole:
    """A router's client, and its membership. Used on one event loop."""

    def __init__(self, config: ServeConfig, telemetry: Telemetry) -> None:
        """Read the model's files but for its weights. Raises what assembling an engine raises."""
        security, start = security_of(config), start_ms()
        assert config.cluster.coordinator is not None, "ClusterConfig demands it of a router"
        base = choose_base(config.engine)
        tokenizer = load_tokenizer(base.folder, config.engine.chat_template, config.engine.tool_call_parser)
        names = base_names(config.engine)
        ends = tuple(dict.fromkeys((*base.config.eos_token_ids, *tokenizer.eos_token_ids)))
        longest = config.engine.max_model_len or base.config.max_model_len
        root = str(config.engine.model or base.folder)
        model = RoutedModel(names, root, longest, base.config.vocab_size, ends)
        served = ServedModel(longest, base.config.vocab_size, weights_digest(base.folder))
        name = member_name(config, "router", config.port or start)
        costs, cluster = costs_of(config), config.cluster
        router = POLICIES[cluster.policy].router(costs.setting(cluster.routers))(np.random.default_rng())
        forwarding = Forwarding(router, OpenLink(LINK_VERSION, name, start), security, served)
        view = ClusterView()

        def report() -> RouterReport:
            return RouterReport(name, router.table.version, start, tuple(router.refused_tokens.items()))

        hello = MemberHello(VERSION, name, "router", start, profile=costs.digest)
        self.control = ControlClient(hello, connection_to(config.cluster.coordinator, security), view, report)
        self.client = ClusterClient(
            model, tokenizer, telemetry, forwarding, view, self.control.administration, config.max_waiting,
            config.cluster.slo_ttft_s,
        )  # fmt: skip

    async def start(self) -> None:
        """Look for the coordinator, and for a while wait for its view and a node: till then other routers answer."""
        self.control.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while not self.client.stats().healthy:
                    await asyncio.sleep(_POLL_S)

    async def drain(self, timeout_s: float) -> None:
        """Do nothing: the client drains what runs."""

    async def close(self) -> None:
        """Leave."""
        await self.control.close()
