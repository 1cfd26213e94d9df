"""What tenants use is counted once, kept through failures and kills, and told to whom it concerns."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine.api.keys import AccessRules
from engine.api.usage_routes import UsageRoutes
from engine.config.access_config import key_name
from engine.errors import InvalidConfig
from engine.tenants.tenant import Tenant, TenantLimits, key_digest
from engine.tenants.usage_counts import SECONDS_A_DAY, UsageCount, UsageCounts, UsageKey
from engine.tenants.usage_file import UsageFile, UsageQuery
from engine.tenants.usage_log import UsageLog
from scheduler.request import Origin, SamplingParams
from tests.engine.api.session import session
from tests.engine.tenants.test_tenant_doors import Doors, at_doors

ALL = UsageQuery("0000-01-01", "9999-12-31")
DAY_S = 1_790_000_000.0  # 2026-09-21
KEPT = """
import asyncio, os, sys
from pathlib import Path
from engine.tenants import usage_log
from engine.tenants.usage_counts import UsageCounts
from engine.tenants.usage_log import UsageLog

usage_log.PERIOD_S = 0.3

async def main():
    counts, counted = UsageCounts(), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
    UsageLog.open(counts, Path(sys.argv[1]), 30).start()
    number = 0
    while True:
        counts.ended("acme", "low", 10, 4, 5)
        number += 1
        os.pwrite(counted, f"{number:012}".encode(), 0)
        await asyncio.sleep(0.001)

asyncio.run(main())
"""


class Day:
    def __init__(self) -> None:
        self.now_s = DAY_S

    def __call__(self) -> float:
        return self.now_s


def rows(path: Path) -> dict[UsageKey, UsageCount]:
    file = UsageFile(path)
    try:
        return dict(file.read(ALL))
    finally:
        file.close()


def test_several_processes_add_to_one_file_and_rows_are_found_by_day_tenant_and_adapter(
    tmp_path: Path,
) -> None:
    path = tmp_path / "usage.sqlite"
    one, two = UsageFile(path), UsageFile(path)
    for day in ("2026-01-01", "2026-01-02"):
        for file in (one, two, two):
            file.add(
                {
                    UsageKey(day, "a", "x"): UsageCount(1, 2, 1, 4, 0),
                    UsageKey(day, "b", "y"): UsageCount(refusals=1),
                }
            )
    assert one.read(UsageQuery("2026-01-02", "2026-01-02", "a")) == [
        (UsageKey("2026-01-02", "a", "x"), UsageCount(3, 6, 3, 12, 0))
    ]
    assert [key.day for key, _ in one.read(UsageQuery("0000-01-01", "9999-12-31", None, "y"))] == [
        "2026-01-01",
        "2026-01-02",
    ]
    assert len(one.read(UsageQuery("0000-01-01", "9999-12-31", most=3))) == 3
    one.forget_before("2026-01-02")
    assert {key.day for key, _ in two.read(ALL)} == {"2026-01-02"}
    one.close()
    two.close()


@pytest.mark.parametrize("fault", ["no SQLite", "another format", "a folder", "no folder"])
def test_a_file_that_cannot_be_used_is_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    if fault == "no SQLite":
        path.write_bytes(b"not a database" * 100)
    elif fault == "another format":
        with closing(sqlite3.connect(path)) as database:
            database.execute("pragma user_version = 7")
    elif fault == "a folder":
        path.mkdir()
    else:
        path = tmp_path / "none" / "usage.sqlite"
    with pytest.raises(InvalidConfig, match=r"^usage_file="):
        UsageFile(path)


def test_what_could_not_be_written_is_written_later_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts, path = UsageCounts(Day()), tmp_path / "usage.sqlite"
    full, add = threading.Event(), UsageFile.add

    def adding(file: UsageFile, taken: Mapping[UsageKey, UsageCount]) -> None:
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        add(file, taken)

    monkeypatch.setattr(UsageFile, "add", adding)

    async def scenario() -> None:
        counts.ended("nobody keeps this", "x", 1, 1, 1)
        log = UsageLog.open(counts, path, 30)
        assert log is not None
        counts.ended("a", "x", 3, 9, 2)
        full.set()
        assert await log.read(ALL) == []
        counts.ended("a", "x", 3, 2, 2)
        await log.read(ALL)
        full.clear()
        assert await log.read(ALL) == [(UsageKey("2026-09-21", "a", "x"), UsageCount(2, 6, 5, 4, 0))]
        counts.refused("a", "")
        await log.close()
        await log.close()

    asyncio.run(scenario())
    assert rows(path) == {
        UsageKey("2026-09-21", "a", ""): UsageCount(refusals=1),
        UsageKey("2026-09-21", "a", "x"): UsageCount(2, 6, 5, 4, 0),
    }
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_only_so_many_days_are_kept(tmp_path: Path) -> None:
    day = Day()
    counts, path = UsageCounts(day), tmp_path / "usage.sqlite"

    async def scenario() -> None:
        log = UsageLog.open(counts, path, 2)
        assert log is not None
        for _ in range(4):
            counts.ended("a", "x", 1, 0, 1)
            await log.read(ALL)
            day.now_s += SECONDS_A_DAY
        await log.close()

    asyncio.run(scenario())
    assert {key.day for key in rows(path)} == {"2026-09-24"}


def test_a_kill_loses_only_what_was_counted_since_the_last_writes_began(tmp_path: Path) -> None:
    path, counted = tmp_path / "usage.sqlite", tmp_path / "counted"
    process = subprocess.Popen([sys.executable, "-c", KEPT, str(path), str(counted)])

    def kept() -> int:
        return sum(count.requests for count in rows(path).values())

    def next_write(after: int) -> int:
        while (now := kept()) == after:
            assert process.poll() is None
            time.sleep(0.05)
        return now

    try:
        first = next_write(0)
        before = int(counted.read_text())
        next_write(next_write(first))
        process.kill()
    finally:
        process.kill()
        process.wait()
    assert first <= before <= kept() <= int(counted.read_text())
    (count,) = rows(path).values()
    assert count == UsageCount(*(count.requests * each for each in (1, 10, 4, 5, 0)))


def test_what_doors_answer_is_counted_for_its_tenant_and_refusals_are_too(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        counts = doors.engine.usage
        counts.is_kept = True
        for _ in range(3):
            await doors.complete("few")
        await doors.complete("all", prompt=[[7, 8], [7, 8, 9]], n=2, max_tokens=2)
        await doors.complete("low", "nobody")
        with pytest.raises(Exception, match="neither"):
            await doors.engine.submit_all("nobody", {"x": (7,)}, SamplingParams(), Origin("low"))
        today = counts.today()
        assert counts.take() == {
            UsageKey(today, "few", "low"): UsageCount(2, 6, 0, 10, 1),
            UsageKey(today, "all", "low"): UsageCount(2, 5, 0, 8, 0),
            UsageKey(today, "low", ""): UsageCount(refusals=1),
        }
        text = (await doors.send("all", "GET", "/metrics"))[1].decode()
        for line in (
            'loraserve_tenant_requests_total{reason="length",tenant="few"} 2.0',
            'loraserve_tenant_requests_total{reason="refused",tenant="few"} 1.0',
            'loraserve_tenant_prompt_tokens_total{tenant="all"} 5.0',
            'loraserve_tenant_output_tokens_total{tenant="all"} 8.0',
        ):
            assert line in text

    at_doors(tmp_path, scenario)


async def test_a_key_sees_its_own_usage_and_an_admin_key_everybody_s(tmp_path: Path) -> None:
    counts = UsageCounts(Day())
    log = UsageLog.open(counts, tmp_path / "usage.sqlite", 30)
    assert log is not None
    ask = key_name("ask")
    for tenant, adapter in (("acme", "x"), ("acme", "y"), (ask, "x")):
        counts.ended(tenant, adapter, 3, 1, 2)
    acme = Tenant("acme", frozenset({key_digest("acme-key")}), limits=TenantLimits())
    rules = AccessRules(["ask"], ["admin"], tenants=[acme])
    async with session(rules=rules, more=[UsageRoutes(log)]) as api:

        async def get(key: str, query: str = "") -> Any:
            response = await api.send("GET", f"/v1/usage{query}", headers={"Authorization": f"Bearer {key}"})
            if response.status != 200:
                return response.status, response.error["param"]
            return [(row["tenant"], row["adapter"]) for row in response.json["data"]]

        assert (
            await get("acme-key") == await get("acme-key", "?tenant=acme") == [("acme", "x"), ("acme", "y")]
        )
        assert await get("ask") == [(ask, "x")]
        assert len(await get("admin")) == 3
        assert await get("admin", "?tenant=acme&adapter=y") == [("acme", "y")]
        assert await get("admin", "?from=2026-09-21&to=2026-09-21&adapter=x") == sorted(
            [("acme", "x"), (ask, "x")]
        )
        assert await get("admin", "?from=2026-09-22") == await get("admin", "?to=2026-09-20") == []
        assert await get("acme-key", f"?tenant={ask}") == (403, "tenant")
        for query, field in (
            ("?from=yesterday", "from"),
            ("?to=2026-02-30", "to"),
            ("?from=2026-09-22&to=2026-09-21", "from"),
            ("?day=2026-09-21", "day"),
        ):
            assert await get("admin", query) == (400, field)
        whole = await api.send("GET", "/v1/usage", headers={"Authorization": "Bearer ask"})
        assert whole.json == {
            "object": "list",
            "data": [
                {"day": "2026-09-21", "tenant": ask, "adapter": "x", "requests": 1, "prompt_tokens": 3,
                 "cached_tokens": 1, "completion_tokens": 2, "refusals": 0}
            ],
            "has_more": False,
        }  # fmt: skip
        described = (await api.send("GET", "/openapi.json", headers={"Authorization": "Bearer ask"})).json[
            "paths"
        ]
        assert "/v1/usage" in described
    await log.close()
