"""The registry of a single server: what was confirmed is so again after a restart, aliases move, pins stay."""

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from engine.async_engine import AsyncEngine
from engine.catalogue.base import EntrySettings
from engine.catalogue.catalogue_file import CatalogueFile
from engine.errors import AdapterBusy, AdapterFailed, AskRouter, InvalidAdapterName, UnknownModel
from engine.metrics.telemetry import Telemetry
from lora.format.allowed_roots import AllowedRoots
from scheduler.plan import StepPlan
from scheduler.request import InvalidParameter, SamplingParams
from tests.engine.rig import Rig, build
from tests.oracles.adapters import base_shape, write_adapter

T = TypeVar("T")
NOW_S, TIMEOUT_S = 1.8e9, 30


def _serve(
    folder: Path,
    visit: Callable[[AsyncEngine, Rig], Awaitable[T]],
    registry: Path | None = None,
    roots: Path | None = None,
) -> T:
    """Run `visit` beside a server that starts, which has low and high by its options, and ends."""

    async def session() -> T:
        rig = build(folder)
        file = CatalogueFile(registry, NOW_S) if registry else None
        engine = AsyncEngine(rig.engine, Telemetry(), 64, file, AllowedRoots.below([roots or folder]))
        await engine.start()
        try:
            return await asyncio.wait_for(visit(engine, rig), TIMEOUT_S)
        finally:
            await engine.close()

    return asyncio.run(session())


def _folder(root: Path, seed: int) -> Path:
    return write_adapter(root / f"more-{seed}", base_shape(), 4, seed)


async def _names(engine: AsyncEngine) -> dict[str, str | None]:
    return {record.name: record.version for record in await engine.catalogue.records("", 100)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_what_was_confirmed_is_so_again_after_a_restart(root: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"

    async def first(engine: AsyncEngine, rig: Rig) -> dict[str, str | None]:
        await engine.load_adapter("mine", _folder(root, 1))
        await engine.load_adapter("gone", _folder(root, 2))
        await engine.catalogue.set_alias("latest", "mine")
        await engine.catalogue.set_alias("small", "low")
        await engine.catalogue.set("latest", EntrySettings(1, 9))
        await engine.catalogue.set("high", EntrySettings(max_requests=3))
        await engine.unload_adapter("gone")
        return await _names(engine)

    async def second(engine: AsyncEngine, rig: Rig) -> None:
        assert set(await _names(engine)) == {"low", "high", "mine", "latest", "small"}
        for name in ("mine", "latest", "small", "high"):
            output = await engine.submit(name, (7, 8), SamplingParams(max_tokens=1), name)
            assert [delta async for delta in output]
        assert await _names(engine) == before | {"low": None}
        latest = await engine.catalogue.record("latest")
        assert (latest.alias_of, latest.pinned, latest.max_requests) == ("mine", 1, 9)
        assert (await engine.catalogue.record("high")).max_requests == 3
        await engine.unload_adapter("latest")

    before = _serve(root, first, registry)
    _serve(root, second, registry)
    assert "latest" not in _serve(root, lambda engine, rig: _names(engine), registry)
    assert set(_serve(root, lambda engine, rig: _names(engine))) == {"low", "high"}


def test_options_win_over_the_file_and_folders_that_may_not_be_read_or_are_gone_are_told(
    root: Path, tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    outside = tmp_path / "outside"
    outside.mkdir()

    async def first(engine: AsyncEngine, rig: Rig) -> None:
        await engine.load_adapter("low", _folder(root, 1))
        await engine.load_adapter("lost", _folder(root, 2))
        await engine.load_adapter("outside", _folder(outside, 3))

    async def second(engine: AsyncEngine, rig: Rig) -> None:
        records = {record.name: record for record in await engine.catalogue.records("", 100)}
        assert records["low"].source == str(rig.folders["low"])
        assert "adapter_config.json" in str(records["lost"].error)
        output = engine.submit("outside", (7,), SamplingParams(max_tokens=1), "x")
        with pytest.raises(AdapterFailed):
            await output
        with pytest.raises(UnknownModel):
            await engine.submit("lost", (7,), SamplingParams(max_tokens=1), "y")
        await engine.unload_adapter("lost")
        assert "lost" not in await _names(engine)

    _serve(root, first, registry)
    shutil.rmtree(root / "more-2")
    _serve(root, second, registry)
    assert "lost" not in _serve(root, lambda engine, rig: _names(engine), registry)


def test_an_alias_keeps_its_version_when_the_other_name_moves_on_and_moves_itself_in_one_step(
    root: Path,
) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        one = await engine.load_adapter("v", _folder(root, 1))
        await engine.catalogue.set_alias("latest", "v")
        two = await engine.load_adapter("v", _folder(root, 2))
        assert await _names(engine) == {"low": None, "high": None, "v": two.digest, "latest": one.digest}
        seen: set[str | None] = set()

        async def watch() -> None:
            while True:
                seen.add((await _names(engine)).get("latest", "nothing"))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        for at in range(20):
            await engine.catalogue.set_alias("latest", "v" if at % 2 else "low")
        watching.cancel()
        low = (await _names(engine))["low"]
        assert seen <= {one.digest, two.digest, low}
        assert (await engine.catalogue.record("latest")).version == two.digest
        with pytest.raises(UnknownModel):
            await engine.catalogue.set_alias("latest", "nobody")
        for name in ("base", "a b"):
            with pytest.raises(InvalidAdapterName):
                await engine.catalogue.set_alias(name, "v")

    _serve(root, visit)


def test_a_pinned_adapter_is_brought_to_the_device_and_its_successor_instead_of_it(root: Path) -> None:
    async def until_on_device(engine: AsyncEngine, name: str, version: str | None) -> None:
        while True:
            record = await engine.catalogue.record(name)
            if record.tiers == {"single": "device"} and version in (None, record.version):
                return
            await asyncio.sleep(0.02)

    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        await engine.catalogue.set("low", EntrySettings(pinned=1))
        await until_on_device(engine, "low", None)
        kept, store = rig.engine.store.kept, rig.engine.store
        before = store.registry.known("low")
        assert before is not None
        assert kept.keeps(before)
        after = await engine.load_adapter("low", _folder(root, 5))
        await until_on_device(engine, "low", after.digest)
        while kept.keeps(before) or not kept.keeps(after):
            await asyncio.sleep(0.02)
        await engine.catalogue.set("low", EntrySettings(pinned=0))
        assert not kept.keeps(after)
        with pytest.raises(InvalidParameter, match="single server"):
            await engine.catalogue.set("low", EntrySettings(pinned=2))
        with pytest.raises(UnknownModel):
            await engine.catalogue.set("base", EntrySettings(pinned=1))

    _serve(root, visit)


def test_no_more_requests_than_its_limit_are_under_way_by_a_name(root: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        await engine.catalogue.set("low", EntrySettings(max_requests=2))
        with pytest.raises(InvalidParameter, match="at most 2"):
            await engine.submit_all("low", {str(at): (7,) for at in range(3)}, params)
        rig.executor.gate.clear()  # or they may have ended before they are looked at
        outputs = await engine.submit_all("low", {"a": (7,), "b": (8,)}, params)
        assert (await engine.catalogue.record("low")).in_flight == 2
        with pytest.raises(AdapterBusy):
            await engine.submit("low", (9,), params, "c")
        other = await engine.submit("high", (9,), params, "d")
        await other.aclose()
        await outputs[0].aclose()
        third = await engine.submit("low", (9,), params, "e")
        for output in (outputs[1], third):
            await output.aclose()
        rig.executor.gate.set()
        record = await engine.catalogue.record("low")
        assert record.in_flight == 0
        assert record.last_use_s is not None

    _serve(root, visit)


def test_a_second_server_with_the_same_file_takes_it_over_and_the_first_keeps_nothing_more(
    root: Path, tmp_path: Path
) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        CatalogueFile(tmp_path / "registry", NOW_S + 9).close()
        with pytest.raises(AdapterFailed, match="taken over"):
            await engine.load_adapter("mine", _folder(root, 1))

    _serve(root, visit, tmp_path / "registry")
    assert "mine" not in _serve(root, lambda engine, rig: _names(engine), tmp_path / "registry")


def test_a_node_of_a_cluster_leaves_its_registry_to_the_coordinator(root: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        engine.catalogue.hand_over("n1")
        with pytest.raises(AskRouter):
            await engine.catalogue.set_alias("x", "low")
        with pytest.raises(AskRouter):
            await engine.catalogue.set("low", EntrySettings(pinned=1))
        assert (await engine.catalogue.record("low")).tiers == {"n1": "folder"}
        assert [node.name for node in (await engine.catalogue.cluster()).nodes] == ["n1"]

    _serve(root, visit)


def test_a_scrape_tells_where_adapters_are_and_who_draws_tokens(root: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        over = threading.Event()

        def hold(plan: StepPlan) -> None:
            """Let the first tokens be drawn, and no further ones while the scrape is made."""
            assert len(rig.executor.plans) < 3 or over.wait(60)

        rig.executor.fault = hold
        output = await engine.submit("low", (7, 8), SamplingParams(max_tokens=100, ignore_eos=True), "a")
        await anext(output)
        series = {each.name: dict(each.samples) for each in engine.series()}
        ((running, waiting, most),) = series["vllm:lora_requests_info"]
        assert (running, waiting, most) == ("low", "", "256")
        assert series["vllm:num_requests_running"] == {("base",): 1}
        assert series["loraserve_adapter_residency"] == {("low", "8", "device", "0"): 1.0}
        assert series["loraserve_adapters"] == {("device", "8"): 1.0}
        with pytest.raises(UnknownModel):
            await engine.submit("nobody", (7,), SamplingParams(max_tokens=1), "b")
        refused = {each.name: dict(each.samples) for each in engine.series()}["loraserve_requests_refused"]
        assert refused == {("unknown_model",): 1.0}
        over.set()
        await output.aclose()

    _serve(root, visit)
