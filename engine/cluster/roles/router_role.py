"""Make a router: the model's tokenizer and card without its weights, links to nodes, and a way to the coordinator."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import numpy as np

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.base.model_card import base_folder, model_card
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
from engine.cluster.router.cluster_client import ClusterClient
from engine.cluster.router.forwarding import Forwarding
from engine.cluster.router.name_finder import NameFinder
from engine.cluster.view import ClusterView, ServedModel
from engine.config.config import ServeConfig
from engine.metrics.telemetry import Telemetry
from engine.tenants.limit_share import LimitShare
from model.checkpoint_files import read_config, weights_digest
from scheduler.cluster.policies import POLICIES
from scheduler.cluster.protocol.messages import RouterReport

_SETTLE_S, _POLL_S = 15.0, 0.05


class RouterRole:
    """A router's client, and its membership. Used on one event loop."""

    def __init__(self, config: ServeConfig, telemetry: Telemetry) -> None:
        """Read the model's files but for its weights. Raises what assembling an engine raises."""
        security, start = security_of(config), start_ms()
        assert config.cluster.coordinator is not None, "ClusterConfig demands it of a router"
        folder = base_folder(config.engine)
        model = read_config(folder)
        tokenizer = load_tokenizer(folder, config.engine.chat_template, config.engine.tool_call_parser)
        longest = config.engine.max_model_len or model.max_model_len
        card = model_card(config.engine, model, folder, longest, tokenizer.eos_token_ids)
        served = ServedModel(longest, model.vocab_size, weights_digest(folder))
        name = member_name(config, "router", config.port or start)
        costs, cluster = costs_of(config), config.cluster
        setting = replace(costs.setting(cluster.routers), weights=cluster.tenant_weights)
        router = POLICIES[cluster.policy].router(setting)(np.random.default_rng())
        forwarding = Forwarding(router, OpenLink(LINK_VERSION, name, start), security, served)
        view = ClusterView()

        def report() -> RouterReport:
            return RouterReport(name, router.table.version, start, tuple(router.refused_tokens.items()))

        hello = MemberHello(VERSION, name, "router", start, profile=costs.digest)
        self.control = ControlClient(hello, connection_to(config.cluster.coordinator, security), view, report)
        sources = config.engine.sources
        template = sources.allowed().template
        finder = NameFinder(view, self.control.administration, template, sources.absent_s)
        self.client = ClusterClient(
            card, tokenizer, telemetry, forwarding, view, self.control.administration, config.max_waiting,
            config.cluster.slo.ttft_s, finder,
        )  # fmt: skip
        self.control.asked = self.client.catalogue
        view.changed.append(lambda: self.client.accounts.divide(LimitShare.among(name, view.routers)))

    async def start(self) -> None:
        """Look for the coordinator, and for a while wait for its view and a node: till then other routers answer."""
        self.control.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while self.client.stats().trouble is not None:
                    await asyncio.sleep(_POLL_S)

    async def drain(self, timeout_s: float) -> None:
        """Do nothing: the client drains what runs."""

    async def close(self) -> None:
        """Leave."""
        await self.control.close()
