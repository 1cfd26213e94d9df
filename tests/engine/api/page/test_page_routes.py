"""The page over HTTP: its files and no others, its policy, who may watch, and an end when the server ends."""

import asyncio
import json
import re
import time
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from typing import get_args

import aiohttp
import pytest
from yarl import URL

from engine.api.adapters import AdapterAdmin
from engine.api.guard import RequestGuard
from engine.api.http import http_app
from engine.api.keys import AccessRules
from engine.api.page import event_feed
from engine.api.page.page_assets import POLICY
from engine.api.server.listener import HttpServer
from engine.catalogue.base import SizeRecord
from engine.config.http_config import HttpConfig
from engine.metrics.request_log import RequestLog
from scheduler.cluster.coordinator.node_need import NeedReason
from scheduler.cluster.coordinator.replan import Reason
from scheduler.cluster.coordinator.size_keeper import SizeReason
from tests.engine.api.session import TOKENIZER, ApiSession, session
from tests.engine.api.test_connections import connected
from tests.fakes.engine_client import FakeClient
from tests.page.simulated_cluster import SimulatedCluster

STATIC = files("engine.api.page") / "static"
FILES = sorted(each.name for each in STATIC.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
HOSTILE = "<img src=x onerror=alert(1)>\n\nevent: whole"


async def first_events(api: ApiSession, count: int, **headers: str) -> list[tuple[str, dict[str, object]]]:
    """The first events of the page's stream."""
    found: list[tuple[str, dict[str, object]]] = []
    async with api.http.get("/page/events", headers=headers) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        while len(found) < count:
            lines = (await response.content.readuntil(b"\n\n")).decode().splitlines()
            found.append((lines[0].removeprefix("event: "), json.loads(lines[2].removeprefix("data: "))))
    return found


async def test_the_page_and_its_files_are_served_under_a_policy_that_lets_nothing_else_in() -> None:
    async with session(rules=AccessRules(["ask"], ["admin"])) as api:
        for path in ("/", *(f"/page/{name}" for name in FILES)):
            served = await api.send("GET", path)
            assert served.status == 200, path
            assert served.headers["Content-Security-Policy"] == POLICY
            assert served.headers["X-Content-Type-Options"] == "nosniff"
        index = await api.send("GET", "/")
        assert index.headers["Content-Type"] == "text/html; charset=utf-8"
        assert (await api.send("GET", "/page/main.js")).headers["Content-Type"].startswith("text/javascript")
    assert "default-src 'none'" in POLICY
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


@pytest.mark.parametrize(
    "name",
    ["", "nothing.js", "..", "../page_assets.py", "..%2fpage_assets.py", "%2e%2e%2fhttp.py", "%00", "static/main.js",
     "..%5c..%5chttp.py", "/etc/passwd", "%2fetc%2fpasswd", "main.js%00.css", "__init__.py"],
)  # fmt: skip
async def test_no_path_leads_out_of_the_pages_files(name: str) -> None:
    async with session() as api:
        url = URL(f"{api.http._base_url}/page/{name}", encoded=True)
        assert (await api.send("GET", url)).status in (404, 400)  # pyright: ignore[reportArgumentType]


def test_the_page_refers_to_its_own_files_only_and_has_no_script_or_style_within() -> None:
    index = (STATIC / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"#]+)"', index)
    assert {name.removeprefix("/page/") for name in named} <= set(FILES)
    assert re.search(r"<script[^>]*>\s*\S+\s*</script>|<style|\son\w+=|\sstyle=", index) is None
    for name in SCRIPTS:
        text = (STATIC / name).read_text()
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(FILES)
        assert (
            re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
            is None
        ), name
    assert re.search(r"url\(|@import", (STATIC / "page.css").read_text()) is None


@pytest.mark.parametrize(
    ("table", "reasons"),
    [
        ("REASONS", get_args(Reason)),
        ("SIZE_REASONS", get_args(NeedReason) + get_args(get_args(SizeReason)[-1])),
    ],
)
def test_the_page_has_words_for_every_reason(table: str, reasons: tuple[str, ...]) -> None:
    (body,) = re.findall(rf"const {table} = {{(.*?)}};", (STATIC / "panels.js").read_text(), re.DOTALL)
    assert set(re.findall(r"^  (\w+):", body, re.MULTILINE)) == set(reasons)


async def test_only_who_may_see_the_cluster_may_watch_it() -> None:
    async with session(rules=AccessRules(["ask"], ["admin"])) as api:
        assert (await api.send("GET", "/page/events")).status == 401
        asks = await api.send("GET", "/page/events", headers={"Authorization": "Bearer ask"})
        assert (asks.status, asks.error["code"]) == (403, "admin_key_required")
        await first_events(api, 1, Authorization="Bearer admin")
    async with session() as api:
        await first_events(api, 1)
        for site in ("cross-site", "same-site"):
            other = await api.send("GET", "/page/events", headers={"Sec-Fetch-Site": site})
            assert (other.status, other.error["code"]) == (403, "other_site")
        await first_events(api, 1, **{"Sec-Fetch-Site": "same-origin"})


async def test_the_first_event_tells_all_there_is_and_names_are_data() -> None:
    cluster = SimulatedCluster(3, 2500, [HOSTILE])
    cluster.pass_time(1, 50)
    cluster.size = SizeRecord(4, 3, 30.0, "load", 2, 6)
    async with session(cluster.engine) as api:
        ((kind, told), (later, change)) = await first_events(api, 2)
    assert (kind, later) == ("whole", "delta")
    tables = told["tables"]
    assert isinstance(tables, dict)
    assert {name: len(rows) for name, rows in tables.items() if name in ("nodes", "adapters", "routers")} == {
        "nodes": 3, "adapters": 2501, "routers": 1
    }  # fmt: skip
    assert HOSTILE in tables["adapters"]
    assert "batches" in tables
    assert not tables["batches"], "there are none where the server takes none"
    assert set(tables["latency"]) <= {"8", "16", "32", "64", "128"}
    assert tables["placements"]["1"]["reasons"] == ["start"]
    assert "adapters" not in change, "what did not change is not told again"
    size = tables["size"][""]
    assert (size["lowest"], size["highest"], size["wanted"], size["present"]) == (2, 6, 4, 3)
    assert (size["reason"], abs(time.time() - 30 - size["at_s"]) < 20) == ("load", True)


async def test_the_page_is_told_until_when_an_adapter_is_held() -> None:
    cluster = SimulatedCluster(2, 1, ["held"])
    cluster.records["held"] = replace(cluster.records["held"], held_s=90.0)
    async with session(cluster.engine) as api:
        ((_, told),) = await first_events(api, 1)
    tables = told["tables"]
    assert isinstance(tables, dict)
    until = {name: row.get("held_until_s") for name, row in tables["adapters"].items()}
    assert until.pop("held") == pytest.approx(time.time() + 90, abs=20)
    assert list(until.values()) == [None]


async def test_as_many_watch_as_may_and_none_where_there_is_no_page() -> None:
    async with session(config=HttpConfig(page_watchers=1)) as api, api.http.get("/page/events") as response:
        await response.content.readuntil(b"\n\n")
        second = await api.send("GET", "/page/events")
        assert (second.status, second.headers["Retry-After"]) == (503, "5")
    async with session(config=HttpConfig(page_watchers=0)) as api:
        assert [(await api.send("GET", path)).status for path in ("/", "/page/main.js", "/page/events")] == [
            404
        ] * 3


async def test_a_server_that_stops_ends_the_streams_of_who_watches() -> None:
    engine = FakeClient(TOKENIZER)
    app = http_app(engine, AdapterAdmin(engine, ()), RequestGuard(AccessRules(), RequestLog()))
    server = HttpServer(app)
    url = await server.listen("127.0.0.1", 0)
    async with aiohttp.ClientSession(url) as client, client.get("/page/events") as response:
        await response.content.readuntil(b"\n\n")
        reading = asyncio.create_task(response.content.read())
        await server.close()
        rest = await reading  # which raises for a stream that is cut off
    assert rest == b"" or rest.startswith(b"event: delta")


@pytest.mark.slow
async def test_a_client_that_takes_nothing_is_hung_up_on_and_its_place_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_feed, "_MOST_EVENTS", 1)
    long_names = [f"{at} {'x' * 4000}" for at in range(3000)]  # more than the system takes without a reader
    cluster = SimulatedCluster(2, 1, long_names)
    async with (
        session(cluster.engine, config=HttpConfig(page_watchers=1)) as api,
        connected(api, 4096) as idle,
    ):
        await idle.send(b"GET /page/events HTTP/1.1\r\nHost: a\r\n\r\n")
        statuses = {503}
        while statuses == {503}:  # as many watch as may, until the server has hung up
            await asyncio.sleep(0.05)
            async with api.http.get("/page/events") as response:
                statuses = {response.status}
        assert statuses == {200}
        with suppress(ConnectionError):
            await idle.rest()  # which ends only with the connection
