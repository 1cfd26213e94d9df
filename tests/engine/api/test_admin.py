"""The registry of adapters over HTTP: who may see and change it, what is refused, and what is told."""

from pathlib import Path
from typing import Any

import pytest

from engine.api.keys import AccessRules
from engine.metrics.request_log import RequestLog
from engine.runner.step_history import StepHistory
from scheduler.plan import StepPlan
from tests.engine.api.session import TOKENIZER, ApiSession, session
from tests.engine.api.test_openapi import SCHEMAS, absent
from tests.fakes.engine_client import FakeClient

ADAPTERS = "/v1/adapters"
CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", ADAPTERS, {"name": "new", "source": "new"}),
    ("POST", f"{ADAPTERS}/alias", {"name": "latest", "target": "poet"}),
    ("POST", f"{ADAPTERS}/pin", {"name": "poet"}),
    ("POST", f"{ADAPTERS}/unpin", {"name": "poet"}),
    ("POST", f"{ADAPTERS}/limit", {"name": "poet", "max_requests": 3}),
    ("POST", f"{ADAPTERS}/hold", {"name": "poet", "seconds": 5}),
    ("POST", f"{ADAPTERS}/release", {"name": "poet"}),
    ("POST", f"{ADAPTERS}/abort", {"name": "poet"}),
    ("DELETE", f"{ADAPTERS}/team/coder", {}),
]
READS = ["/cluster", "/debug/steps", ADAPTERS, f"{ADAPTERS}/poet", f"{ADAPTERS}/team/coder"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "adapter_config.json").write_text("{}")
    return tmp_path


async def statuses(api: ApiSession, key: str | None, **headers: str) -> set[int]:
    given = {**headers, **({"Authorization": f"Bearer {key}"} if key else {})}
    found = [(await api.send("GET", path, headers=given)).status for path in READS]
    found += [(await api.send(how, path, json=body, headers=given)).status for how, path, body in CHANGES]
    return set(found)


async def test_only_who_may_administer_sees_or_changes_the_registry(root: Path) -> None:
    rules = AccessRules(["ask"], ["admin"])
    async with session(roots=[root], rules=rules) as api:
        assert await statuses(api, None) == {401}
        assert await statuses(api, "ask") == {403}
        assert await statuses(api, "admin") == {200}
    async with session(roots=[root]) as api:
        assert await statuses(api, None, Origin="https://page.example") == {403}
        assert await statuses(api, None) == {200}
    async with session(roots=[root], rules=AccessRules([], [], "nobody")) as api:
        assert await statuses(api, None) == {403}


async def test_changes_are_audited_and_reads_are_not(root: Path, tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "audit")
    async with session(roots=[root], log=log) as api:
        assert await statuses(api, None) == {200}
        assert log.flush()
        lines = (tmp_path / "audit").read_text().splitlines()
    assert [f'"action": "{path}"' in line for (_, path, _), line in zip(CHANGES, lines, strict=True)] == [
        True
    ] * len(CHANGES)
    assert all('"outcome": "done"' in line for line in lines)


async def test_an_adapter_is_registered_aliased_pinned_limited_and_removed(root: Path) -> None:
    async with session(roots=[root]) as api:
        body = {"name": "new", "source": str(root / "new"), "copies": 2, "max_requests": 4}
        made = (await api.post(ADAPTERS, body)).json
        assert absent(made, SCHEMAS["Adapter"]) == []
        assert (made["name"], made["source"], made["pinned"], made["max_requests"]) == ("new", "new", 2, 4)
        assert (await api.post(ADAPTERS, body)).error["code"] == "adapter_exists"
        assert (await api.post(ADAPTERS, body | {"replace": True})).status == 200
        alias = (await api.post(f"{ADAPTERS}/alias", {"name": "latest", "target": "new"})).json
        assert (alias["name"], alias["alias_of"]) == ("latest", "new")
        assert (await api.openai.completions.create(model="latest", prompt="hi")).model == "latest"
        assert (await api.post(f"{ADAPTERS}/pin", {"name": "new", "copies": 3})).json["pinned"] == 3
        unpinned = (await api.post(f"{ADAPTERS}/unpin", {"name": "new"})).json
        assert (unpinned["pinned"], unpinned["max_requests"]) == (0, 4)
        gone = await api.send("DELETE", f"{ADAPTERS}/new")
        assert gone.json == {"id": "new", "object": "adapter", "deleted": True}
        assert (await api.send("GET", f"{ADAPTERS}/new")).status == 404
        assert (await api.send("DELETE", f"{ADAPTERS}/new")).error["code"] == "model_not_found"


async def test_a_long_registry_comes_in_pages_in_order_of_names() -> None:
    names = tuple(f"tenant/{at:05d}" for at in range(2500))
    async with session(FakeClient(TOKENIZER, names)) as api:
        seen: list[str] = []
        after, page = "", {}
        for _ in range(3):
            page = (await api.send("GET", ADAPTERS, params={"limit": "1000", "after": after})).json
            assert absent(page, SCHEMAS["Adapters"]) == []
            seen += [each["name"] for each in page["data"]]
            after = page["next"] or ""
        assert seen == list(names)
        assert (page["has_more"], page["next"]) == (False, None)
        assert len((await api.send("GET", ADAPTERS)).json["data"]) == 100
        for limit in ("0", "-1", "1001", "x", "", "1" * 5000, "٣"):
            refused = await api.send("GET", ADAPTERS, params={"limit": limit})
            assert (refused.status, refused.error["param"]) == (400, "limit"), limit
        assert (await api.send("GET", ADAPTERS, params={"page": "2"})).error["code"] == "unknown_field"
        assert (await api.send("GET", "/cluster")).json["adapters"] == 2500


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"name": "new", "source": "new", "copies": 0}, "copies"),
        ("", {"name": "new", "source": "/etc"}, "lora_path"),
        ("", {"name": "a b", "source": "new"}, "lora_name"),
        ("/alias", {"name": "poet", "target": "poet"}, "target"),
        ("/alias", {"name": "x", "target": "nobody"}, "model"),
        ("/pin", {"name": "nobody"}, "model"),
        ("/pin", {"name": "poet", "copies": 1 << 40}, "copies"),
        ("/pin", {"name": "poet", "copies": True}, "copies"),
        ("/limit", {"name": "poet"}, "max_requests"),
        ("/limit", {"name": "poet", "max_requests": -1}, "max_requests"),
        ("/unpin", {"name": "poet", "copies": 1}, "copies"),
        ("/unpin", [], None),
    ],
)
async def test_what_cannot_be_is_refused_by_name(root: Path, path: str, body: Any, param: str | None) -> None:
    async with session(roots=[root]) as api:
        refused = await api.post(ADAPTERS + path, body)
        assert 400 <= refused.status < 500
        assert refused.error["param"] == param
        assert [each.name for each in api.engine.adapters()] == ["poet", "team/coder"]


async def test_the_last_steps_are_told_where_there_are_any() -> None:
    engine, history = FakeClient(TOKENIZER), StepHistory()
    history.ran(StepPlan(()), 0.25)
    engine.steps = history.last()
    async with session(engine) as api:
        told = (await api.send("GET", "/debug/steps")).json
        assert absent(told, SCHEMAS["Steps"]) == []
        assert [(each["number"], each["seconds"], each["slices"]) for each in told["data"]] == [(1, 0.25, [])]
        engine.steps = None  # as of a router
        refused = await api.send("GET", "/debug/steps")
        assert (refused.status, refused.error["code"]) == (404, "ask_a_node")
