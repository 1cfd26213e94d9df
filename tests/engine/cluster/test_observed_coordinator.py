"""A coordinator over HTTP: it shows the cluster to whoever may see it, and answers no requests."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.cluster.roles.coordinator_role import run_coordinator
from engine.cluster.roles.observed_coordinator import CoordinatorDoor, ObservedCoordinator
from engine.config.access_config import AccessConfig
from engine.config.cluster_config import ClusterConfig
from engine.config.config import EngineConfig, ServeConfig
from engine.config.peer_config import PeerConfig
from engine.errors import InvalidConfig
from engine.metrics.telemetry import Telemetry
from scheduler.cluster.coordinator.size_keeper import SizeBounds
from tests.engine.cluster.control_rig import ControlRig, control_rig, until
from transport.base import Address

LOCAL = Address("127.0.0.1", 0)
ADMIN = {"Authorization": "Bearer an-admin-key"}
ASKS = {"Authorization": "Bearer an-api-key"}
KEYS = AccessConfig(api_keys=("an-api-key",), admin_keys=("an-admin-key",))


@dataclass(frozen=True, slots=True)
class Door:
    """A coordinator, with a node of two adapters, and a client of its HTTP."""

    rig: ControlRig
    http: aiohttp.ClientSession

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        async with self.http.get(path, headers=headers) as response:
            return response.status, await response.text()

    async def cluster(self) -> dict[str, Any]:
        status, text = await self.get("/cluster")
        assert status == 200
        return json.loads(text)

    async def series(self) -> dict[tuple[str, ...], float]:
        """The samples of a scrape, by name and labels' values."""
        _, text = await self.get("/metrics")
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@asynccontextmanager
async def open_door(access: AccessConfig | None = None) -> AsyncIterator[Door]:
    async with control_rig() as rig:
        server = await rig.coordinator()
        config = ServeConfig(port=0, access=access or AccessConfig())
        door = CoordinatorDoor(ObservedCoordinator(server, Telemetry()), config)
        url = await door.open()
        rig.node("n1", {"a": 0, "b": 0})
        await until(lambda: (nodes := server.status.cluster().nodes) and nodes[0].held == 2)
        try:
            async with aiohttp.ClientSession(url) as http:
                yield Door(rig, http)
        finally:
            await door.close()


def visited(visit: Callable[[Door], Awaitable[None]], access: AccessConfig | None = None) -> None:
    async def scenario() -> None:
        async with open_door(access) as door:
            await visit(door)

    asyncio.run(scenario())


def test_a_coordinator_tells_what_a_router_would_of_its_cluster() -> None:
    async def visit(door: Door) -> None:
        told = await door.cluster()
        router = door.rig.router("r1")
        await until(lambda: router.is_connected)
        asked: dict[str, Any] = msgspec.to_builtins(await router.administration.cluster())
        assert told.keys() == asked.keys()
        assert [(node["name"], node["state"], node["held"]) for node in told["nodes"]] == [
            (node["name"], node["state"], node["held"]) for node in asked["nodes"]
        ]
        assert (told["epoch"], told["adapters"], told["size"]) == (asked["epoch"], 2, None)
        assert json.loads((await door.get("/health"))[1]) == {"status": "ok"}
        assert json.loads((await door.get("/version"))[1]).keys() == {"version"}

    visited(visit)


def test_its_metrics_tell_the_members_and_what_each_node_has() -> None:
    async def visit(door: Door) -> None:
        found = await door.series()
        assert found["loraserve_healthy",] == found["loraserve_cluster_members", "serving"] == 1
        assert found["loraserve_cluster_adapters",] == found["loraserve_node_adapters", "n1", "held"] == 2
        assert found["loraserve_node_memory_bytes", "n1"] == 1 << 40
        assert found["loraserve_cluster_nodes_wanted",] == 0
        assert ("loraserve_steps_total",) not in found, "it computes nothing"
        assert door.rig.server is not None
        door.rig.server.coordinator.size.ask(SizeBounds(1, 3), 1, 0.0)
        assert (await door.series())["loraserve_cluster_nodes_wanted",] == 1
        size = (await door.cluster())["size"]
        assert (size["lowest"], size["highest"], size["wanted"], size["reason"]) == (1, 3, 1, "start")

    visited(visit)


def test_its_page_shows_the_cluster_and_nothing_of_requests() -> None:
    async def visit(door: Door) -> None:
        assert 'data-serves="nobody"' in (await door.get("/"))[1]
        assert (await door.get("/page/main.js"))[0] == 200
        async with door.http.get("/page/events") as response:
            lines = (await response.content.readuntil(b"\n\n")).decode().splitlines()
        tables = json.loads(lines[2].removeprefix("data: "))["tables"]
        assert (tables["nodes"].keys(), tables["adapters"].keys()) == ({"n1"}, {"a", "b"})
        assert "running" not in tables["server"][""]
        for path in ("/v1/models", "/v1/adapters", "/debug/steps", "/openapi.json"):
            status, text = await door.get(path)
            assert (status, json.loads(text)["error"]["code"]) == (404, "unknown_url")

    visited(visit)


def test_the_keys_of_a_router_open_the_same_of_a_coordinator() -> None:
    async def visit(door: Door) -> None:
        async def statuses(headers: dict[str, str]) -> list[int]:
            paths = ("/health", "/version", "/", "/metrics", "/cluster")
            return [(await door.get(path, headers))[0] for path in paths]

        assert await statuses({}) == [200, 200, 200, 401, 401]
        assert await statuses(ASKS) == [200, 200, 200, 200, 403]
        assert await statuses(ADMIN) == [200] * 5
        assert (await door.get("/page/events", ASKS))[0] == 403

    visited(visit, KEYS)


def coordinator(port: int) -> ServeConfig:
    """A coordinator that listens at free ports of this machine, but for HTTP."""
    peers = PeerConfig(listen=LOCAL, token="a-token-of-sixteen", plain=True)
    cluster = ClusterConfig(role="coordinator", cluster_listen=LOCAL)
    return ServeConfig(engine=EngineConfig(peers=peers), port=port, cluster=cluster)


def test_it_says_where_members_and_clients_reach_it_and_ends_when_told() -> None:
    async def scenario() -> str:
        stop, told = asyncio.Event(), list[str]()

        def ready(addresses: str) -> None:
            told.append(addresses)
            stop.set()

        await run_coordinator(coordinator(0), Telemetry(), ready, stop)
        return told[0]

    members, _, url = asyncio.run(scenario()).partition(" and ")
    assert members.startswith("127.0.0.1:")
    assert url.startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = coordinator(taken.getsockname()[1])
        with pytest.raises(InvalidConfig, match=r"^port=.*choose another port"):
            asyncio.run(run_coordinator(config, Telemetry(), lambda _: None, asyncio.Event()))
