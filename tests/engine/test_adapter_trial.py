"""An adapter that comes while the engine serves is tried before its name is used, and behind all requests."""

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from engine import LLM, LoRARequest
from engine.assembly.assembly import assemble
from engine.assembly.self_test import SelfTest
from engine.async_engine import AsyncEngine
from engine.config.config import EngineConfig
from engine.demo.embedded import adapter_folders
from engine.errors import InvalidAdapter
from engine.metrics.telemetry import Telemetry
from lora.adapter import AdapterRef, Effect
from lora.errors import AdapterRefused
from scheduler.request import Request, SamplingParams
from tests.engine.demo_llm import ASK, GREEDY, said
from tests.engine.rig import Rig, build, is_clean
from tests.engine.test_self_test import SIZES, scaled

T = TypeVar("T")
WAIT_S = 30


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Adapters that change nothing, give no numbers, and are sound; files of the first two look sound."""
    reverse = adapter_folders()["reverse"]
    return {
        "faint": scaled(reverse, tmp_path / "faint", ("lora_B",), 1e-30),
        "wild": scaled(reverse, tmp_path / "wild", ("q_proj", "k_proj"), 2.5e9),
        "sound": Path(shutil.copytree(reverse, tmp_path / "sound")),
    }


def effect_of(engine: AsyncEngine, name: str) -> Effect | None:
    (entry,) = [entry for entry in engine.adapters() if entry.name == name]
    return entry.effect


def serve(visit: Callable[[AsyncEngine], Awaitable[T]], lora_dir: Path | None = None) -> T:
    """Run `visit` beside an engine of the embedded model; no request may be left, and none was counted."""

    async def session() -> T:
        assembled = assemble(EngineConfig(progress=False, lora_dir=lora_dir, lora_dir_poll_s=0.0, **SIZES))
        engine = AsyncEngine(assembled, Telemetry(), 8)
        await engine.start()
        try:
            return await asyncio.wait_for(visit(engine), WAIT_S)
        finally:
            assert is_clean(assembled)
            await engine.close()

    return asyncio.run(session())


async def ask(engine: AsyncEngine, model: str) -> int:
    """Ask for one token, and count what came."""
    output = await engine.submit(model, (5, 6, 7), SamplingParams(max_tokens=1, temperature=0), f"r-{model}")
    return sum([len(delta.token_ids) async for delta in output])


def test_a_load_is_told_what_the_adapter_changes(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    async def visit(engine: AsyncEngine) -> None:
        before = engine.stats().store
        await engine.load_adapter("faint", folders["faint"])
        await engine.load_adapter("sound", folders["sound"])
        assert [effect_of(engine, name) for name in ("faint", "sound")] == ["none", "some"]
        with pytest.raises(InvalidAdapter, match=r"'wild' is refused.*NaN or infinite"):
            await engine.load_adapter("wild", folders["wild"])
        assert not engine.may_serve("wild")
        with pytest.raises(InvalidAdapter):
            await engine.load_adapter("sound", folders["wild"])
        assert (await ask(engine, "sound"), effect_of(engine, "sound")) == (1, "some")
        for name in ("faint", "sound"):
            await engine.unload_adapter(name)
        await ask(engine, "demo")
        after = engine.stats().store
        assert (after.resident, after.free_pages) == (before.resident, before.free_pages)
        lines = engine.telemetry.render(engine.stats()).decode().splitlines()
        counted = [line.split()[1] for line in lines if line.startswith("loraserve_requests_started_total{")]
        assert counted == ["1.0", "1.0"]

    serve(visit)
    assert caplog.text.count("adapter faint changes nothing: a short prompt") == 1


def test_a_folder_is_tried_when_it_is_first_asked_for(folders: dict[str, Path]) -> None:
    async def visit(engine: AsyncEngine) -> None:
        assert {effect_of(engine, name) for name in folders} == {None}
        assert [await ask(engine, name) for name in ("faint", "sound")] == [1, 1]
        assert [effect_of(engine, name) for name in ("faint", "sound")] == ["none", "some"]
        for _ in range(2):
            with pytest.raises(InvalidAdapter, match="NaN or infinite"):
                await ask(engine, "wild")
        (entry,) = [entry for entry in engine.adapters() if entry.name == "wild"]
        assert entry.ref is None
        assert entry.refusal is not None

    serve(visit, folders["sound"].parent)


def test_the_offline_door_tries_what_it_is_given(folders: dict[str, Path], llm: LLM) -> None:
    requests = [
        LoRARequest("trial-sound", 1, folders["sound"]),
        LoRARequest("trial-faint", 2, folders["faint"]),
    ]
    assert said(llm.chat([ASK, ASK], GREEDY, lora_request=requests)) == ["nedrag", "garden"]
    with pytest.raises(AdapterRefused, match="NaN or infinite"):
        llm.chat(ASK, GREEDY, lora_request=LoRARequest("trial-wild", 3, folders["wild"]))
    assert is_clean(llm.engine)
    assert "trial-wild" not in llm.engine.store.registry.names()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = build(tmp_path)
    yield made
    made.engine.store.close()


def trial_of(rig: Rig, patience_s: float = WAIT_S) -> SelfTest:
    engine = rig.engine
    return SelfTest(
        engine.core, engine.changed, engine.card.vocab_size, engine.card.max_model_len, patience_s
    )


def request(rig: Rig, name: str, ref: AdapterRef, **fields: bool) -> Request:
    return Request(name, (7, 8, 9), ref, SamplingParams(max_tokens=1, seed=0), (), time.monotonic(), **fields)


def test_a_trial_that_nobody_computes_in_time_says_so_and_leaves_nothing(rig: Rig) -> None:
    ref = rig.engine.store.registry.resolve("low")
    with rig.engine.core.driving:  # somebody else steps, and does not come to it
        assert trial_of(rig, patience_s=0.01)(ref, waits=True) == "unknown"
    assert is_clean(rig.engine)
    assert trial_of(rig)(ref, waits=True) in ("some", "none")


def test_a_first_use_does_not_wait_behind_requests_to_be_tried(rig: Rig) -> None:
    ref = rig.engine.store.registry.resolve("low")
    rig.engine.core.submit(request(rig, "r", ref))
    assert trial_of(rig)(ref, waits=False) is None
    rig.engine.core.abort("r")
    assert is_clean(rig.engine)


def test_what_the_engine_asks_of_itself_goes_last_and_is_counted_nowhere(rig: Rig) -> None:
    core, ref = rig.engine.core, rig.engine.store.registry.resolve("low")
    probe = core.probe(request(rig, "probe", ref, background=True))
    for number in range(9):
        core.submit(request(rig, f"r{number}", ref))
    live = core.live()
    assert (live.waiting, live.running) == (9, 0)
    told = [core.step() for _ in range(6)]
    order = [part.key.request_id for plan in rig.executor.plans for part in plan.slices]
    assert order.index("probe") > order.index("r8")  # 8 run at once
    assert probe.result(0).token_id is not None
    assert not any(event.key.request_id == "probe" for result in told for event in result.events)
    core.abort("probe")


def test_trials_in_several_threads_step_for_each_other(rig: Rig) -> None:
    refs = [rig.engine.store.registry.resolve(name) for name in ("low", "high")]
    trial, found = trial_of(rig), list[Effect | None]()
    threads = [threading.Thread(target=lambda ref=ref: found.append(trial(ref, True))) for ref in refs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 2
    assert is_clean(rig.engine)
