"""Administrators hold an adapter's name, and end its requests; nobody who asks for another one notices."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from engine.async_engine import AsyncEngine
from engine.catalogue.base import MOST_HELD_S
from engine.metrics.request_log import RequestLog
from engine.metrics.telemetry import Telemetry
from scheduler.plan import StepPlan
from tests.engine.api.session import ApiSession, events, session
from tests.engine.rig import Rig, build, is_clean

ABORT, HOLD, RELEASE = (f"/v1/adapters/{act}" for act in ("abort", "hold", "release"))
COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
AFTER = 3  # tokens


class Stopped:
    """An engine whose steps stop before a sequence's fourth token, until `go_on` is set."""

    def __init__(self, rig: Rig) -> None:
        self.go_on, self.reached = threading.Event(), threading.Event()
        rig.executor.fault = self._wait

    def _wait(self, plan: StepPlan) -> None:
        if any(part.output_index == AFTER for part in plan.slices):
            self.reached.set()
            assert self.go_on.wait(60), "the test left it stopped"


def serve(folder: Path, visit: Callable[[ApiSession, Rig, Stopped], Awaitable[object]]) -> list[str]:
    """Run `visit` with a server; return what its audit says. Nothing of any request may be left."""

    async def run() -> None:
        rig, log = build(folder), RequestLog(folder / "audit")
        engine, stopped = AsyncEngine(rig.engine, Telemetry(), 8), Stopped(rig)
        await engine.start()
        try:
            async with session(engine, log=log) as api:
                await asyncio.wait_for(visit(api, rig, stopped), 60)
                assert log.flush()
        finally:
            stopped.go_on.set()
            await engine.close()
            assert is_clean(rig.engine)

    asyncio.run(run())
    return (folder / "audit").read_text().splitlines()


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": [7, 8, 9], "max_tokens": 6, "return_token_ids": True} | fields


def test_an_adapter_s_requests_end_with_what_they_have_and_others_go_on(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig, stopped: Stopped) -> None:
        generate = {"model": "low", "token_ids": [7], "sampling_params": {"max_tokens": 6, "n": 2}}
        running = asyncio.ensure_future(api.post(COMPLETIONS, body("low", stream=True)))
        while not stopped.reached.is_set():
            await asyncio.sleep(0)
        asked = [
            api.post(GENERATE, generate), api.post(COMPLETIONS, body("high", n=2)),
            api.post(COMPLETIONS, body("base", stream=True)),
        ]  # fmt: skip
        tasks = [running, *(asyncio.ensure_future(each) for each in asked)]
        while rig.engine.core.num_live_requests < len(tasks):
            await asyncio.sleep(0)
        late = asyncio.ensure_future(api.post(COMPLETIONS, body("low", prompt_logprobs=1)))
        while rig.engine.core.num_live_requests < len(tasks) + 1:
            await asyncio.sleep(0)
        assert (await api.post(ABORT, {"name": "low"})).json == {
            "id": "low",
            "object": "adapter",
            "aborted": 3,
        }
        streamed, drawn, unbegun = await tasks[0], await tasks[1], await late  # while the engine stands still
        *chunks, done = events(streamed.body)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert (done, choices[-1]["finish_reason"]) == ("[DONE]", "abort")
        assert sum(len(choice.get("token_ids", ())) for choice in choices) == AFTER
        for choice in drawn.json["choices"]:
            assert (choice["finish_reason"], choice["token_ids"]) == ("abort", [])
        (choice,) = unbegun.json["choices"]
        assert (choice["finish_reason"], choice["text"], choice["prompt_logprobs"]) == ("abort", "", None)
        assert not tasks[2].done()
        stopped.go_on.set()
        high, base = await tasks[2], await tasks[3]
        assert [(each["finish_reason"], len(each["token_ids"])) for each in high.json["choices"]] == [
            ("length", 6)
        ] * 2
        assert events(base.body)[-2]["choices"][0]["finish_reason"] == "length"
        assert (await api.post(COMPLETIONS, body("low"))).json["choices"][0]["finish_reason"] == "length"
        assert (await api.post(ABORT, {"name": "low"})).json["aborted"] == 0
        assert (await api.post(ABORT, {"name": "nobody"})).status == 404

    (line, *_) = serve(tmp_path, visit)
    assert '"action": "/v1/adapters/abort", "adapter": "low", "status": 200, "outcome": "done"' in line


def test_a_held_name_takes_no_requests_until_it_is_released_and_others_do(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig, stopped: Stopped) -> None:
        running = asyncio.ensure_future(api.post(COMPLETIONS, body("low")))
        while not stopped.reached.is_set():
            await asyncio.sleep(0)
        held = (await api.post(HOLD, {"name": "low", "seconds": 600})).json
        assert 0 < held["held_s"] <= 600
        refused = await api.post(COMPLETIONS, body("low"))
        assert (refused.status, refused.error["code"]) == (503, "adapter_held")
        assert 1 <= int(refused.headers["Retry-After"]) <= 600
        told = (await api.send("GET", "/metrics")).body.decode()
        assert "loraserve_adapters_held 1.0" in told
        assert 'loraserve_requests_refused_total{reason="adapter_held"} 1.0' in told
        stopped.go_on.set()
        assert (await running).json["choices"][0]["finish_reason"] == "length"
        assert (await api.post(COMPLETIONS, body("high"))).status == 200
        assert (await api.post(RELEASE, {"name": "low"})).json["held_s"] is None
        assert "loraserve_adapters_held 0.0" in (await api.send("GET", "/metrics")).body.decode()
        assert (await api.post(COMPLETIONS, body("low"))).status == 200
        assert (await api.post(RELEASE, {"name": "low"})).status == 200
        assert (await api.post(HOLD, {"name": "nobody"})).status == 404
        assert (await api.post(HOLD, {"name": "base"})).status == 404
        for seconds in (0, -1, MOST_HELD_S + 1, "x"):
            assert (await api.post(HOLD, {"name": "low", "seconds": seconds})).error["param"] == "seconds"

    lines = serve(tmp_path, visit)
    assert ['/hold", "adapter": "low"' in line for line in lines[:2]] == [True, False]


def test_a_hold_ends_by_itself(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig, stopped: Stopped) -> None:
        stopped.go_on.set()
        assert (await api.post(HOLD, {"name": "low", "seconds": 0.05})).status == 200
        while (await api.post(COMPLETIONS, body("low"))).status == 503:
            await asyncio.sleep(0.01)
        assert (await api.send("GET", "/v1/adapters/low")).json["held_s"] is None
        assert 59 < (await api.post(HOLD, {"name": "low"})).json["held_s"] <= 60

    serve(tmp_path, visit)


def test_a_node_of_a_cluster_leaves_both_to_its_router(tmp_path: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(build(tmp_path).engine, Telemetry(), 8)
        engine.catalogue.hand_over("n1")
        await engine.start()
        try:
            async with session(engine) as api:
                for path in (HOLD, RELEASE, ABORT):
                    assert (await api.post(path, {"name": "low"})).error["code"] == "ask_a_router"
        finally:
            await engine.close()

    asyncio.run(run())
