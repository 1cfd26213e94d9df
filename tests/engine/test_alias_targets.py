"""An alias that leads to several adapters by share: who answers is a matter of the request's key alone, and kept."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.catalogue.alias_targets import AliasTarget, check_targets, chosen_target
from engine.catalogue.base import EntrySettings
from engine.catalogue.catalogue_file import CatalogueFile
from engine.errors import AdapterBusy, InvalidAdapterName, UnknownModel
from engine.metrics.telemetry import Telemetry
from lora.format.allowed_roots import AllowedRoots
from scheduler.request import InvalidParameter, Origin, SamplingParams
from tests.engine.api.session import ApiSession, session
from tests.engine.rig import build
from tests.oracles.adapters import base_shape, write_adapter

ALIAS, TIMEOUT_S = "/v1/adapters/alias", 30
MOSTLY_LOW = (AliasTarget("low", 0.9), AliasTarget("high", 0.1))
KEYS = [f"request-{at}" for at in range(2000)]
ONE = SamplingParams(max_tokens=1)


def serve(folder: Path, visit: Callable[[AsyncEngine], Awaitable[object]], file: Path | None = None) -> None:
    """Run `visit` beside a server that has `low` and `high` by its options."""

    async def run() -> None:
        registry = CatalogueFile(file, 0.0) if file is not None else None
        engine = AsyncEngine(build(folder).engine, Telemetry(), 64, registry, AllowedRoots.below([folder]))
        await engine.start()
        try:
            await asyncio.wait_for(visit(engine), TIMEOUT_S)
        finally:
            await engine.close()

    asyncio.run(run())


async def digest_of(engine: AsyncEngine, name: str) -> str | None:
    return (await engine.catalogue.record(name)).version


async def answered_by(engine: AsyncEngine, key: str, salt: str = "") -> str:
    """Ask the alias; return the digest of the content that answered."""
    (output,) = await engine.submit_all("best", {key: (7, 8)}, ONE, Origin(cache_salt=salt))
    assert [delta async for delta in output]
    return output.adapter_digest


def test_requests_are_divided_by_their_shares_and_a_key_stays_with_its_target() -> None:
    found = {key: chosen_target("best", MOSTLY_LOW, key) for key in KEYS}
    assert 1750 < Counter(found.values())["low"] < 1850
    assert found == {key: chosen_target("best", MOSTLY_LOW, key) for key in reversed(KEYS)}
    assert found != {key: chosen_target("other", MOSTLY_LOW, key) for key in KEYS}
    assert {chosen_target("best", (), key) for key in KEYS} == {"best"}


def test_a_share_that_grows_moves_keys_one_way_only() -> None:
    half = (AliasTarget("low", 0.5), AliasTarget("high", 0.5))
    moved = {(chosen_target("best", MOSTLY_LOW, key), chosen_target("best", half, key)) for key in KEYS}
    assert moved == {("low", "low"), ("low", "high"), ("high", "high")}


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ((("low", 0.9), ("high", 0.2)), r"targets.share=\[0.9, 0.2\].*sum to 1.1: give shares that sum to 1"),
        ((("low", 0.5),), "sum to 0.5"),
        ((("low", 0.5), ("low", 0.5)), "targets='low'.*twice"),
        ((("low", 0.5), ("best", 0.5)), "targets='best'.*the alias itself"),
    ],
)
def test_targets_that_cannot_be_are_refused_by_field_and_value(
    targets: tuple[tuple[str, float], ...], told: str
) -> None:
    with pytest.raises(InvalidParameter, match=told):
        check_targets("best", [AliasTarget(*each) for each in targets])
    check_targets("best", [AliasTarget("a", 0.1), AliasTarget("b", 0.2), AliasTarget("c", 0.7)])


def test_each_request_is_answered_by_its_target_and_counted_for_that(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine) -> None:
        await engine.catalogue.set_alias("best", "low", MOSTLY_LOW)
        digests = {name: await digest_of(engine, name) for name in ("low", "high")}
        found = Counter[str]()
        for key in KEYS[:40]:
            target = chosen_target("best", MOSTLY_LOW, key)
            assert await answered_by(engine, key) == digests[target]
            found[target] += 1
        assert len(found) == 2
        text = engine.telemetry.render(engine.stats(), engine.series()).decode()
        for name, count in found.items():
            assert f'loraserve_requests_started_total{{adapter="{name}"}} {float(count)}' in text
        salted = [await answered_by(engine, key, "talk") for key in KEYS[:8]]
        assert set(salted) == {digests[chosen_target("best", MOSTLY_LOW, "talk")]}

    serve(tmp_path, visit)


def test_shares_outlive_a_restart_and_go_in_one_step(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "registry"
    folder.mkdir()
    halves = (AliasTarget("mine", 0.5), AliasTarget("high", 0.5))

    async def first(engine: AsyncEngine) -> None:
        await engine.load_adapter("mine", write_adapter(folder / "mine", base_shape(), 4, 1))
        await engine.catalogue.set_alias("best", "mine", halves)

    async def second(engine: AsyncEngine) -> None:
        told = await engine.catalogue.record("best")
        assert (told.alias_of, told.targets) == ("mine", halves)
        answered = {await answered_by(engine, key) for key in KEYS[:16]}
        assert answered == {await digest_of(engine, "mine"), await digest_of(engine, "high")}
        await engine.catalogue.set_alias("best", "high")

    async def third(engine: AsyncEngine) -> None:
        assert (await engine.catalogue.record("best")).targets == ()
        (answered,) = {await answered_by(engine, key) for key in KEYS[:16]}
        assert answered == await digest_of(engine, "best")

    for visit in (first, second, third):
        serve(folder, visit, file)


def test_what_an_alias_leads_to_is_kept_and_leads_nowhere_itself(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine) -> None:
        catalogue = engine.catalogue
        await catalogue.set_alias("best", "low", MOSTLY_LOW)
        with pytest.raises(InvalidAdapterName, match="alias best leads to it by share"):
            await engine.unload_adapter("high")
        other = (AliasTarget("best", 0.5), AliasTarget("low", 0.5))
        with pytest.raises(InvalidAdapterName, match="target best is an alias with shares"):
            await catalogue.set_alias("more", "best", other)
        with pytest.raises(InvalidAdapterName, match="alias best leads to it by share"):
            await catalogue.set_alias("high", "low", (AliasTarget("low", 0.5), AliasTarget("x", 0.5)))
        for unknown in ("nobody", "base"):
            with pytest.raises(UnknownModel, match=unknown):
                await catalogue.set_alias("best", "low", (MOSTLY_LOW[0], AliasTarget(unknown, 0.1)))
        assert (await catalogue.record("best")).targets == MOSTLY_LOW
        await catalogue.set_alias("best", "low")
        await engine.unload_adapter("high")
        assert await answered_by(engine, "x") == await digest_of(engine, "low")

    serve(tmp_path, visit)


def test_targets_whose_prompts_would_differ_are_refused(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine) -> None:
        folder = write_adapter(tmp_path / "own", base_shape(), 4, 1)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        await engine.load_adapter("own", folder)
        with pytest.raises(InvalidAdapterName, match="low and own differ in chat template"):
            await engine.catalogue.set_alias("best", "low", (MOSTLY_LOW[0], AliasTarget("own", 0.1)))

    serve(tmp_path, visit)


def test_bounds_and_ends_of_the_alias_hold_whoever_answers(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine) -> None:
        await engine.catalogue.set_alias("best", "low", MOSTLY_LOW)
        await engine.catalogue.set("best", EntrySettings(max_requests=1))
        params = SamplingParams(max_tokens=100, n=2, ignore_eos=True)
        output = await engine.submit("best", (7, 8), params, KEYS[0])
        with pytest.raises(AdapterBusy):
            await answered_by(engine, KEYS[1])
        assert await engine.catalogue.abort("best") == 1
        assert [delta async for delta in output]
        assert (await engine.catalogue.record("best")).in_flight == 0

    serve(tmp_path, visit)


async def fingerprint(api: ApiSession, **more: Any) -> str:
    body = {"model": "best", "prompt": ["a", "b"], "n": 2, "max_tokens": 1, **more}
    answer = await api.post("/v1/completions", body)
    assert (answer.status, answer.json["model"], len(answer.json["choices"])) == (200, "best", 4)
    return answer.json["system_fingerprint"]


def test_over_http_the_answer_tells_its_version_and_a_salt_keeps_it(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine) -> None:
        async with session(engine) as api:
            half = [{"name": "low", "share": 0.5}, {"name": "high", "share": 0.5}]
            made = (await api.post(ALIAS, {"name": "best", "targets": half})).json
            assert (made["alias_of"], made["targets"]) == ("low", half)
            told = {each: str(await digest_of(engine, each))[:16] for each in ("low", "high")}
            targets = (AliasTarget("low", 0.5), AliasTarget("high", 0.5))
            for salt in ("one", "two", "three", "four"):
                found = {await fingerprint(api, cache_salt=salt) for _ in range(3)}
                assert found == {told[chosen_target("best", targets, salt)]}
            back = (await api.post(ALIAS, {"name": "best", "targets": [{"name": "high", "share": 1}]})).json
            assert (back["alias_of"], back["targets"]) == ("high", [])
            assert await fingerprint(api) == told["high"]

    serve(tmp_path, visit)


async def test_over_http_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"targets": [{"name": "low", "share": 0.9}, {"name": "high", "share": 0.2}]}, "targets.share"),
        ({"targets": [{"name": "low", "share": 0}, {"name": "high", "share": 1}]}, "targets[0].share"),
        ({"targets": [{"name": "low", "share": "1"}]}, "targets[0].share"),
        ({"targets": [{"name": "low", "part": 1}]}, "targets[0].part"),
        ({"targets": [{"name": f"a{at}", "share": 1 / 17} for at in range(17)]}, "targets"),
        ({"targets": [{"name": "low", "share": 0.5}, {"name": "nobody", "share": 0.5}]}, "model"),
        ({"target": "low", "targets": [{"name": "low", "share": 1}]}, "target"),
        ({"targets": []}, "target"),
        ({"target": ""}, "model"),
        ({}, "target"),
    ]
    engine = AsyncEngine(build(tmp_path).engine, Telemetry(), 64)
    await engine.start()
    async with session(engine) as api:
        for body, param in refusals:
            refused = await api.post(ALIAS, {"name": "best", **body})
            assert (refused.status // 100, refused.error["param"]) == (4, param), refused.error
            assert {each.name for each in engine.adapters()} == {"low", "high"}
    await engine.close()
