"""Tenants are held to what they may at every door: HTTP, gRPC and batches, before one engine."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from engine.async_engine import AsyncEngine
from engine.config.batches_config import BatchesConfig
from engine.config.config import ServeConfig
from engine.config.tenants_config import TenantsConfig
from engine.metrics.telemetry import Telemetry
from engine.rpc.wire import control_pb2
from engine.tenants.meter import MINUTE_S
from engine.tenants.tenant import Tenant
from scheduler.request import Origin, SamplingParams
from tests.engine.rig import build, is_clean
from tests.engine.rpc.door import Ask, RpcDoor, served
from tests.engine.tenants.test_accounts import Clock

PARAMS, LOW = SamplingParams(max_tokens=20), Origin("low")
PARTS = ("limit", "remaining", "reset")
FILE = """
[tenants.few]
key_file = "few.keys"
requests_per_minute = 2

[tenants.low]
key_file = "low.keys"
adapters = ["low"]
base = false
tokens_per_minute = 40

[tenants.all]
key_file = "all.keys"
"""


class Doors:
    """A server whose tenants are `few`, `low` and `all`; each has a key like its name."""

    def __init__(self, http: aiohttp.ClientSession, rpc: RpcDoor, clock: Clock, engine: AsyncEngine) -> None:
        self.http, self.rpc, self.clock, self.engine = http, rpc, clock, engine

    async def send(
        self, tenant: str, method: str, path: str, **how: Any
    ) -> tuple[int, Any, Mapping[str, str]]:
        headers = {"Authorization": f"Bearer {tenant}-key"}
        async with self.http.request(method, path, headers=headers, **how) as answer:
            body = await answer.read()
            return answer.status, json.loads(body) if body[:1] == b"{" else body, answer.headers

    async def complete(
        self, tenant: str, model: str = "low", **fields: Any
    ) -> tuple[int, Any, Mapping[str, str]]:
        body = {"model": model, "prompt": [7, 8, 9], "max_tokens": 5} | fields
        return await self.send(tenant, "POST", "/v1/completions", json=body)

    async def models(self, tenant: str) -> list[str]:
        return [model["id"] for model in (await self.send(tenant, "GET", "/v1/models"))[1]["data"]]


def at_doors(folder: Path, scenario: Callable[[Doors], Awaitable[None]]) -> None:
    """Run a scenario; afterwards nothing of any request may be left."""
    for name in ("few", "low", "all"):
        (folder / f"{name}.keys").write_text(f"{name}-key")
    (folder / "tenants.toml").write_text(FILE)
    tenants = TenantsConfig(file=folder / "tenants.toml")
    batches = BatchesConfig(folder / "batches", batch_in_flight=1)
    config = ServeConfig(tenants=tenants, batches=batches)

    async def run() -> None:
        rig, clock = build(folder), Clock()
        engine = AsyncEngine(rig.engine, Telemetry(), 64)
        engine.accounts._clock = clock
        async with asyncio.timeout(60), served(engine, config) as found:
            channel, address, http, stop = found
            async with aiohttp.ClientSession(http) as session:
                await scenario(Doors(session, RpcDoor(channel, address, http, stop), clock, engine))
        assert is_clean(rig.engine)

    asyncio.run(run())


def rates(headers: Mapping[str, str], kind: str) -> tuple[str, ...]:
    return tuple(headers[f"x-ratelimit-{part}-{kind}"] for part in PARTS)


def test_http_tells_what_is_left_and_when_to_come_again(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        _, _, headers = await doors.complete("few")
        assert rates(headers, "requests") == ("2", "1", "30s")
        assert "x-ratelimit-limit-tokens" not in headers
        chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        status, _, headers = await doors.send(
            "few", "POST", "/v1/chat/completions", json=chat | {"stream": True}
        )
        assert (status, rates(headers, "requests")) == (200, ("2", "0", "1m0s"))
        status, body, headers = await doors.complete("few")
        assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "30")
        assert rates(headers, "requests") == ("2", "0", "1m0s")
        assert (await doors.complete("all"))[0] == 200
        assert (await doors.send("few", "GET", "/v1/models"))[0] == 200
        doors.clock.now_s += 30
        assert (await doors.complete("few"))[0] == 200

    at_doors(tmp_path, scenario)


def test_tokens_that_were_not_drawn_or_whose_client_left_are_given_back(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        _, _, headers = await doors.complete("low", max_tokens=30, stop_token_ids=[85])
        used = 40 - int(headers["x-ratelimit-remaining-tokens"])
        assert 3 < used < 33
        (output,) = await doors.engine.submit_all("low", {"x": (7,)}, PARAMS, LOW)
        await output.aclose()
        assert int((await doors.complete("low"))[2]["x-ratelimit-remaining-tokens"]) == 40 - used - 1 - 8
        status, _, headers = await doors.complete("low", prompt=[7] * 20, max_tokens=20)
        assert status == 429
        doors.clock.now_s += int(headers["Retry-After"])
        assert (await doors.complete("low", prompt=[7] * 20, max_tokens=20))[0] == 200
        status, body, _ = await doors.complete("low", prompt=[7] * 21, max_tokens=20)
        assert (status, body["error"]["code"]) == (400, "beyond_limit")

    at_doors(tmp_path, scenario)


def test_grpc_says_the_same_in_its_words(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        few, low = ((("authorization", f"Bearer {name}-key"),) for name in ("few", "low"))
        for left in ("1", "0"):
            call = doors.rpc.stream(Ask(text="hi"), metadata=few)
            assert [part async for part in call]
            assert dict(await call.trailing_metadata())["x-ratelimit-remaining-requests"] == left
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await doors.rpc.generate(Ask(text="hi"), metadata=few)
        told = dict(refusal.value.trailing_metadata())
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (told["retry-after"], rates(told, "requests")) == ("30", ("2", "0", "1m0s"))
        assert (await doors.complete("few"))[0] == 429
        for ask in (Ask(text="hi"), Ask(text="hi", lora_name="high")):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await doors.rpc.generate(ask, metadata=low)
            assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        listed = await doors.rpc.control("ListLoras", control_pb2.ListLorasRequest(), metadata=low)
        assert [adapter.lora_name for adapter in listed.adapters] == ["low"]

    at_doors(tmp_path, scenario)


def test_what_others_have_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        assert await doors.models("low") == ["low"]
        assert await doors.models("all") == ["base", "low", "high"]
        absent = (await doors.complete("low", "nobody"))[1]["error"]
        for model in ("high", "base"):
            assert (await doors.send("low", "GET", f"/v1/models/{model}"))[0] == 404
            for path, body in (
                ("/v1/completions", {"prompt": "hi"}),
                ("/v1/completions", {"prompt": "hi" * 300_000}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
                ("/tokenize", {"prompt": "hi"}),
                ("/detokenize", {"tokens": [7]}),
            ):
                status, told, _ = await doors.send("low", "POST", path, json=body | {"model": model})
                assert (status, told["error"]) == (
                    404,
                    absent | {"message": absent["message"].replace("nobody", model)},
                )
        assert (await doors.send("low", "POST", "/tokenize", json={"prompt": "hi"}))[0] == 404
        by_machine = (await doors.send("all", "GET", "/metrics"))[0]
        assert by_machine == 200, "a key of this machine administers, where there is no admin key"
        assert (await doors.send("nobody", "GET", "/v1/models"))[0] == 401

    at_doors(tmp_path, scenario)


def test_a_file_that_changes_is_held_to_and_one_that_cannot_be_used_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.tenant_watch._PERIOD_S", 0.01)

    async def until(found: Callable[[], Awaitable[bool]]) -> None:
        while not await found():
            await asyncio.sleep(0.01)

    async def scenario(doors: Doors) -> None:
        async def told() -> bool:
            return "no TOML" in caplog.text

        async def is_out() -> bool:
            return (await doors.send("few", "GET", "/v1/models"))[0] == 401

        async def has_other_limits() -> bool:
            return (await doors.complete("low"))[2].get("x-ratelimit-limit-tokens") == "50"

        (tmp_path / "tenants.toml").write_text("[tenants")
        await until(told)
        assert (await doors.complete("few"))[0] == 200
        (tmp_path / "tenants.toml").write_text(FILE.replace("= 40", "= 50"))
        await until(has_other_limits)
        (tmp_path / "few.keys").write_text("other-key")
        await until(is_out)
        assert (await doors.complete("other"))[0] == 200

    at_doors(tmp_path, scenario)


def test_clients_ask_to_go_later_and_never_before_their_class(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        doors.engine.accounts.adopt([Tenant("all", priority=3)])
        asked: list[int] = []
        check_access = doors.engine.accounts.check_access

        def check(origin: Origin, model: str) -> int:
            asked.append(check_access(origin, model))
            return asked[-1]

        doors.engine.accounts.check_access = check
        generate = {"model": "low", "token_ids": [7, 8], "sampling_params": {"max_tokens": 2}}
        for priority in (None, 0, 2, 1000):
            assert (await doors.complete("all", priority=priority))[0] == 200
            path, body = "/inference/v1/generate", generate | {"priority": priority}
            assert (await doors.send("all", "POST", path, json=body))[0] == 200
        assert asked == [3, 3, 3, 3, 5, 5, 1000, 1000]
        for priority in (-1, 1001, 0.5, "high"):
            status, body, _ = await doors.complete("all", priority=priority)
            assert (status, body["error"]["param"]) == (400, "priority")
        await (await Batch.begin(doors, "all", lines("low"))).until("completed", 1)
        assert asked[8:] == [4]

    at_doors(tmp_path, scenario)


def lines(*models: str) -> bytes:
    """A file of completions."""
    body: dict[str, object] = {"prompt": [7, 8], "max_tokens": 4}
    asked: list[dict[str, object]] = [
        {"custom_id": str(at), "method": "POST", "url": "/v1/completions", "body": body | {"model": model}}
        for at, model in enumerate(models)
    ]
    return "\n".join(map(json.dumps, asked)).encode()


class Batch:
    """One batch of a tenant."""

    def __init__(self, doors: Doors, tenant: str, name: str) -> None:
        self.doors, self.tenant, self.name = doors, tenant, name

    @classmethod
    async def begin(cls, doors: Doors, tenant: str, content: bytes) -> "Batch":
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("file", content, filename="in.jsonl")
        form.add_field("purpose", "batch")
        _, file, _ = await doors.send(tenant, "POST", "/v1/files", data=form)
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        status, batch, _ = await doors.send(tenant, "POST", "/v1/batches", json=asked)
        assert status == 200, batch
        return cls(doors, tenant, batch["id"])

    async def told(self) -> tuple[str, int]:
        """Return its status and how many lines are answered."""
        _, batch, _ = await self.doors.send(self.tenant, "GET", f"/v1/batches/{self.name}")
        return batch["status"], batch["request_counts"]["completed"]

    async def until(self, status: str, completed: int) -> None:
        while await self.told() != (status, completed):
            await asyncio.sleep(0.02)


def test_a_batch_is_held_to_its_tenant_s_limits_and_is_nobody_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.batches.batch_run._LEAST_WAIT_S", 0.02)
    monkeypatch.setattr("engine.batches.batch_run._MOST_WAIT_S", 0.02)

    async def scenario(doors: Doors) -> None:
        batch = await Batch.begin(doors, "few", lines("low", "high", "low", "low"))
        await batch.until("in_progress", 2)
        doors.clock.now_s += MINUTE_S
        await batch.until("completed", 4)
        assert (await doors.send("low", "GET", f"/v1/batches/{batch.name}"))[0] == 404

    at_doors(tmp_path, scenario)


def test_batches_that_wait_for_their_tenant_s_limits_hold_up_nobody_else_s(tmp_path: Path) -> None:
    async def scenario(doors: Doors) -> None:
        waiting = [await Batch.begin(doors, "few", lines("low", "low", "low")) for _ in range(5)]
        while sum([(await each.told())[1] for each in waiting]) < 2:
            await asyncio.sleep(0.02)
        await (await Batch.begin(doors, "all", lines("low", "high"))).until("completed", 2)

    at_doors(tmp_path, scenario)
