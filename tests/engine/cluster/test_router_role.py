"""A router as a process: it is told ready once it can serve, and not before."""

import asyncio
import logging

import pytest

from engine.cluster.link.link_messages import VERSION, NodeReady
from engine.cluster.roles.router_role import RouterRole
from engine.config.command_line import serve_config
from engine.metrics.telemetry import Telemetry

LINE = (
    "--role",
    "router",
    "--coordinator",
    "127.0.0.1:9",
    "--peer-plain",
    "--slo-ttft-s",
    "2",
    "--slo-tbt-s",
    "1",
)
TOKEN = {"LORASERVE_PEER_TOKEN": "a-token-of-sixteen"}


def test_a_router_is_told_ready_once_a_node_can_be_reached(caplog: pytest.LogCaptureFixture) -> None:
    async def session() -> None:
        role, told = RouterRole(serve_config(LINE, TOKEN), Telemetry()), asyncio.Event()
        try:
            with caplog.at_level(logging.WARNING):
                role.when_ready(told.set)
            assert "not ready: this router has not heard from the coordinator yet" in caplog.text
            role.client.view.known = True
            for _ in range(3):
                await asyncio.sleep(0)
            assert not told.is_set()
            role.client.forwarding.ready["n1"] = NodeReady(VERSION, "n1", 1, 256, 512, (0,), "0" * 64)
            await asyncio.wait_for(told.wait(), 30)
        finally:
            await role.close()

    asyncio.run(session())


def test_a_router_that_ends_before_it_is_ready_says_nothing() -> None:
    async def session() -> None:
        role, told = RouterRole(serve_config(LINE, TOKEN), Telemetry()), asyncio.Event()
        role.when_ready(told.set)
        await role.close()
        assert not told.is_set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(session())
