"""Serving on an event loop: names, outputs, stop strings, clients that leave, and shutting down."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest
import torch

from engine.api.errors import as_api_error
from engine.api.generation import ENDPOINTS, Generation
from engine.async_engine import AsyncEngine
from engine.errors import (
    AdapterFailed,
    Draining,
    EngineStopped,
    InvalidAdapter,
    InvalidAdapterName,
    Overloaded,
    StepFailed,
    TooManySequences,
    UnknownModel,
)
from engine.metrics.telemetry import Telemetry
from engine.output import RequestOutput
from lora.adapter import AdapterRef
from lora.format.allowed_roots import AllowedRoots
from scheduler.limits import RequestRefused
from scheduler.plan import FinishReason, StepPlan
from scheduler.request import InvalidParameter, SamplingParams
from scheduler.step import StepScheduler
from tests.engine.rig import VOCAB_SIZE, Rig, build, is_clean

T = TypeVar("T")
PROMPT = (7, 8, 9)
TIMEOUT_S = 30


def _params(**fields: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 6} | fields))  # pyright: ignore[reportArgumentType]


def _serve(
    folder: Path,
    visit: Callable[[AsyncEngine, Rig], Awaitable[T]],
    max_waiting: int = 8,
    vocab_size: int = VOCAB_SIZE,
) -> T:
    """Run `visit` beside a started engine; afterwards nothing of any request may be left."""

    async def session() -> T:
        rig = build(folder, vocab_size=vocab_size)
        engine = AsyncEngine(rig.engine, Telemetry(), max_waiting)
        await engine.start()
        try:
            return await asyncio.wait_for(visit(engine, rig), TIMEOUT_S)
        finally:
            rig.executor.gate.set()
            await engine.close()
            assert is_clean(rig.engine)

    return asyncio.run(session())


async def _tokens(stream: RequestOutput) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


def test_each_name_is_answered_under_its_own_adapter(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> list[list[int]]:
        streams = [await engine.submit(name, PROMPT, _params(), name) for name in ("base", "low", "high")]
        return list(await asyncio.gather(*map(_tokens, streams)))

    answers = _serve(tmp_path, visit)
    assert answers == [[75 + rank + i for i in range(6)] for rank in (0, 8, 24 - 26)]


def test_an_unknown_name_is_never_answered_by_the_base(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        with pytest.raises(UnknownModel, match="'absent'"):
            await engine.submit("absent", PROMPT, _params(), "a")
        with pytest.raises(UnknownModel, match="'absent'"):
            await engine.unload_adapter("absent")

    _serve(tmp_path, visit)


def test_what_can_never_run_is_refused_with_the_numbers(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        with pytest.raises(RequestRefused, match="has 127 in its prompt and max_tokens=6"):
            await engine.submit("low", PROMPT[:1] * 127, _params(), "a")

    _serve(tmp_path, visit)


def test_a_chat_token_that_the_model_lacks_is_named_and_ends_nobody_else(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        stream = await engine.submit("base", PROMPT, _params(), "innocent")
        body = {"model": "low", "messages": [{"role": "user", "content": "a\u00adb"}]}
        endpoint = ENDPOINTS["/v1/chat/completions"]
        request = endpoint.read(json.dumps(body).encode(), engine)
        with pytest.raises(
            InvalidParameter, match=f"^messages={VOCAB_SIZE - 1} .*lacks the token"
        ) as refusal:
            async with Generation(endpoint, engine, request):
                pass
        assert as_api_error(refusal.value).status == 400
        rig.executor.gate.set()
        assert len(await _tokens(stream)) == 6

    _serve(tmp_path, visit, vocab_size=VOCAB_SIZE - 1)


def test_all_of_n_sequences_end(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> dict[int, FinishReason]:
        stream = await engine.submit("low", PROMPT, _params(n=4), "a")
        return {delta.index: delta.finish_reason async for delta in stream if delta.finish_reason}

    assert _serve(tmp_path, visit) == dict.fromkeys(range(4), FinishReason.LENGTH)


def test_a_stop_string_ends_the_sequence_in_the_engine_too(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> tuple[str, str | int | None]:
        letters = engine.tokenizer.decode([75, 76, 77, 78])
        stream = await engine.submit("base", PROMPT, _params(max_tokens=100, stop=(letters[2:4],)), "a")
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert "".join(delta.text for delta in deltas) == letters[:2]
        await engine.drain(TIMEOUT_S)
        assert is_clean(rig.engine)
        return letters[2:4], deltas[-1].stop_reason

    wanted, reason = _serve(tmp_path, visit)
    assert reason == wanted


def test_a_client_that_leaves_frees_its_sequences(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.fault = lambda plan: rig.executor.gate.clear()  # the second step will be in flight
        stream = await engine.submit("low", PROMPT, _params(max_tokens=100, n=2), "a")
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        assert is_clean(rig.engine)
        left = [delta async for delta in stream]  # what had come before it left, then the end
        assert all(delta.finish_reason is None for delta in left)

    _serve(tmp_path, visit)


def test_too_many_waiting_are_turned_away_and_room_is_taken_again(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        first = await engine.submit("base", PROMPT, _params(), "running")
        await asyncio.to_thread(rig.executor.entered.wait, TIMEOUT_S)
        waiting = [await engine.submit("base", PROMPT, _params(), f"waiting-{i}") for i in range(2)]
        with pytest.raises(Overloaded, match="2 requests wait already"):
            await engine.submit("base", PROMPT, _params(), "one too many")
        rig.executor.gate.set()
        await asyncio.gather(*map(_tokens, (first, *waiting)))
        assert len(await _tokens(await engine.submit("base", PROMPT, _params(), "later"))) == 6

    _serve(tmp_path, visit, max_waiting=2)


def test_prompts_that_come_together_are_all_queued_or_none_is(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        first = await engine.submit("base", PROMPT, _params(), "running")
        await asyncio.to_thread(rig.executor.entered.wait, TIMEOUT_S)
        three = {f"{number}": PROMPT for number in range(3)}
        with pytest.raises(RequestRefused):
            await engine.submit_all("base", {"fits": PROMPT, "does not": PROMPT * 100}, _params())
        assert engine.stats().waiting == 0
        queued = await engine.submit_all("base", three, _params())
        with pytest.raises(Overloaded):
            await engine.submit_all("low", {"a": PROMPT, "b": PROMPT}, _params())
        assert engine.stats().waiting == 3
        rig.executor.gate.set()
        await asyncio.gather(*map(_tokens, (first, *queued)))

    _serve(tmp_path, visit, max_waiting=4)


def test_more_sequences_than_may_ever_wait_are_refused_for_good(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        with pytest.raises(TooManySequences, match=r"6 sequences.* at most 4 may wait"):
            await engine.submit_all("base", {f"{number}": PROMPT for number in range(3)}, _params(n=2))
        exactly = {f"{number}": PROMPT for number in range(2)}
        assert len(await engine.submit_all("base", exactly, _params(n=2))) == 2

    _serve(tmp_path, visit, max_waiting=4)


def test_min_tokens_that_no_token_could_reach_are_refused(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        every = tuple(range(VOCAB_SIZE))
        with pytest.raises(InvalidParameter, match="min_tokens=1"):
            await engine.submit("base", PROMPT, _params(stop_token_ids=every, min_tokens=1), "a")
        stream = await engine.submit("base", PROMPT, _params(stop_token_ids=every), "b")
        assert len(await _tokens(stream)) == 1

    _serve(tmp_path, visit)


def test_requests_that_wait_for_their_adapter_to_be_read_have_their_place_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        registry, read = rig.engine.store.registry, threading.Event()
        resolve = registry.resolve

        def slow(name: str) -> AdapterRef:
            read.wait(TIMEOUT_S)
            return resolve(name)

        monkeypatch.setattr(registry, "resolve", slow)
        asked = [engine.submit("low", PROMPT, _params(), f"{number}") for number in range(10)]
        answers = asyncio.gather(*asked, return_exceptions=True)
        await asyncio.sleep(0)
        assert engine.stats().waiting == 0
        read.set()
        streams = await answers
        accepted = [stream for stream in streams if isinstance(stream, RequestOutput)]
        assert len(accepted) == 3
        assert sum(isinstance(stream, Overloaded) for stream in streams) == 7
        await asyncio.gather(*map(_tokens, accepted))
        assert len(await _tokens(await engine.submit("low", PROMPT, _params(), "later"))) == 6

    _serve(tmp_path, visit, max_waiting=3)


def test_a_failed_step_reaches_its_clients_and_the_engine_goes_on(tmp_path: Path) -> None:
    def fault(plan: StepPlan) -> None:
        if any(part.key.request_id == "a" for part in plan.slices):
            raise RuntimeError("the device caught fire")

    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.fault = fault
        stream = await engine.submit("low", PROMPT, _params(), "a")
        with pytest.raises(StepFailed):
            await _tokens(stream)
        assert len(await _tokens(await engine.submit("low", PROMPT, _params(), "b"))) == 6
        assert engine.stats().trouble is None

    _serve(tmp_path, visit)


@pytest.mark.parametrize("part", ["plan", "commit"])
def test_an_error_of_the_step_loop_itself_ends_what_runs_and_refuses_what_comes(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: object) -> NoReturn:
        raise KeyError("the books do not balance")

    async def session() -> None:
        rig = build(tmp_path)
        engine = AsyncEngine(rig.engine, Telemetry(), 8)
        told = asyncio.Event()
        engine.on_failure(told.set)
        await engine.start()
        rig.executor.gate.clear()
        streams = [await engine.submit("base", PROMPT, _params(), name) for name in ("a", "b")]
        await asyncio.to_thread(rig.executor.entered.wait, TIMEOUT_S)
        monkeypatch.setattr(StepScheduler, part, fault)
        rig.executor.gate.set()
        for stream in streams:
            with pytest.raises(EngineStopped, match="KeyError"):
                await _tokens(stream)
        await told.wait()
        assert "has stopped" in (engine.stats().trouble or "")
        with pytest.raises(EngineStopped) as refusal:
            await engine.submit("base", PROMPT, _params(), "c")
        assert as_api_error(refusal.value).status == 503
        assert isinstance(engine.failure, EngineStopped)
        await engine.drain(TIMEOUT_S)
        await engine.close()

    asyncio.run(asyncio.wait_for(session(), TIMEOUT_S))


@pytest.mark.parametrize(("when", "lags"), [("fault", False), ("fault", True), ("fault_on_read", True)])
def test_a_device_that_is_lost_ends_the_engine(tmp_path: Path, when: str, lags: bool) -> None:
    """Of a device that asserted, every later step would fail: a supervisor must start the process again."""

    def fault(plan: StepPlan) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    async def session() -> None:
        rig = build(tmp_path, lags=lags)
        engine = AsyncEngine(rig.engine, Telemetry(), 8)
        setattr(rig.executor, when, fault)
        told = asyncio.Event()
        engine.on_failure(told.set)
        await engine.start()
        with pytest.raises(EngineStopped, match="AcceleratorError"):
            await _tokens(await engine.submit("base", PROMPT, _params(), "a"))
        await told.wait()
        assert "has stopped" in (engine.stats().trouble or "")
        with pytest.raises(EngineStopped):
            await engine.submit("base", PROMPT, _params(), "b")
        await engine.close()

    asyncio.run(asyncio.wait_for(session(), TIMEOUT_S))


def test_a_token_that_cannot_be_turned_into_text_ends_its_own_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        token_bytes = engine.tokenizer.token_bytes

        def fault(token_id: int) -> bytes:
            if token_id >= 83:
                raise ValueError("no such token")
            return token_bytes(token_id)

        monkeypatch.setattr(engine.tokenizer, "token_bytes", fault)
        bad = await engine.submit("low", PROMPT, _params(), "bad")
        good = await engine.submit("base", PROMPT, _params(), "good")
        with pytest.raises(StepFailed, match="become text"):
            await _tokens(bad)
        assert len(await _tokens(good)) == 6

    _serve(tmp_path, visit)


def test_a_reload_leaves_running_requests_on_the_old_content(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        old = await engine.submit("low", PROMPT, _params(), "old")
        loaded = await engine.load_adapter("low", rig.folders["high"])
        assert loaded.rank == 24
        new = await engine.submit("low", PROMPT, _params(), "new")
        rig.executor.gate.set()
        assert await _tokens(old) == [83 + i for i in range(6)]
        assert await _tokens(new) == [73 + i for i in range(6)]

    _serve(tmp_path, visit)


def test_an_adapter_is_read_from_below_the_roots_that_it_was_loaded_with(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        folder = rig.folders["high"]
        await engine.load_adapter("low", folder, roots=AllowedRoots.below([folder.parent]))
        with pytest.raises(AdapterFailed, match="leads outside"):
            await engine.load_adapter("low", folder, roots=AllowedRoots.below([tmp_path / "other"]))

    _serve(tmp_path, visit)


def test_an_unloaded_name_is_gone_at_once_while_its_request_finishes(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        stream = await engine.submit("low", PROMPT, _params(), "a")
        await engine.unload_adapter("low")
        with pytest.raises(UnknownModel):
            await engine.submit("low", PROMPT, _params(), "b")
        rig.executor.gate.set()
        assert len(await _tokens(stream)) == 6

    _serve(tmp_path, visit)


def test_no_adapter_may_take_the_base_models_name(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        with pytest.raises(InvalidAdapterName, match="'base'"):
            await engine.load_adapter("base", rig.folders["low"])

    _serve(tmp_path, visit)


def test_draining_lets_what_runs_finish_and_takes_nothing_new(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        stream = await engine.submit("base", PROMPT, _params(), "a")
        drain = asyncio.create_task(engine.drain(TIMEOUT_S))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await engine.submit("base", PROMPT, _params(), "b")
        rig.executor.gate.set()
        await drain
        assert len(await _tokens(stream)) == 6

    _serve(tmp_path, visit)


def test_closing_ends_what_still_runs_with_an_error(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        stream = await engine.submit("base", PROMPT, _params(), "a")
        await engine.drain(0)
        rig.executor.gate.set()
        await engine.close()
        with pytest.raises(Draining):
            [delta async for delta in stream]

    _serve(tmp_path, visit)


def test_an_adapter_that_cannot_be_read_is_said_to_be_so_and_named(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        (rig.folders["low"] / "adapter_model.safetensors").write_bytes(b"torn")
        with pytest.raises(InvalidAdapter, match=r"'low'.*truncated") as refusal:
            await engine.submit("low", PROMPT, _params(), "a")
        told = as_api_error(refusal.value)
        assert (told.status, told.code) == (400, "invalid_adapter")
        assert len(await _tokens(await engine.submit("high", PROMPT, _params(), "b"))) == 6

    _serve(tmp_path, visit)
