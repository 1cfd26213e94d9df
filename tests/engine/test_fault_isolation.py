"""A step that raises ends the requests at fault; the others of its plan go on as if it had not."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from engine import LLM
from engine.core import EngineCore
from engine.errors import EngineError, StepFailed
from lora.adapter import BASE, AdapterRef
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from scheduler.plan import StepPlan, TokenEvent
from scheduler.request import Request, SamplingParams
from tests.engine.rig import Rig, build, is_clean

MAX_STEPS = 200
POISON = 200  # a token that no other prompt holds


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = build(tmp_path)
    yield made
    made.engine.store.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(max_model_len=128, kv_cache_bytes=8 << 20)
    yield made
    made.close()


def _request(name: str, adapter: AdapterRef = BASE, prompt: tuple[int, ...] = (7, 8, 9)) -> Request:
    return Request(name, prompt, adapter, SamplingParams(seed=1, max_tokens=5, temperature=0), (2,), 0.0)


def _run(
    core: EngineCore, wait: Callable[[], None]
) -> tuple[dict[str, list[TokenEvent]], dict[str, EngineError]]:
    """Step until nothing lives: each request's events, and what failed."""
    events: dict[str, list[TokenEvent]] = {}
    failed: dict[str, EngineError] = {}
    for _ in range(MAX_STEPS):
        if not core.num_live_requests:
            return events, failed
        result = core.step()
        for event in result.events:
            events.setdefault(event.key.request_id, []).append(event)
        failed |= {failure.request_id: failure.error for failure in result.failures}
        if result.idle:
            wait()
    raise AssertionError(f"still {core.live()} after {MAX_STEPS} steps")


def _fails_with(*names: str, from_output: int = 0) -> Callable[[StepPlan], None]:
    def fault(plan: StepPlan) -> None:
        if any(part.key.request_id in names and part.output_index >= from_output for part in plan.slices):
            raise IndexError("index out of range")

    return fault


@pytest.mark.parametrize("from_output", [0, 2])
@pytest.mark.parametrize("bad", [("c",), ("a", "e"), ("a", "b", "c", "d")])
def test_the_others_of_a_step_that_raises_get_all_their_tokens(
    rig: Rig, bad: tuple[str, ...], from_output: int
) -> None:
    low, high = rig.engine.store.registry.resolve("low"), rig.engine.store.registry.resolve("high")
    ranks = {"a": 0, "b": 8, "c": 24 - 26, "d": 0, "e": 8}
    rig.executor.fault = _fails_with(*bad, from_output=from_output)
    for name, ref in zip(ranks, (BASE, low, high, BASE, low), strict=True):
        rig.engine.core.submit(_request(name, ref))
    events, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert failed.keys() == set(bad)
    assert all(isinstance(error, StepFailed) for error in failed.values())
    for name in ranks.keys() - set(bad):
        assert [event.token_id for event in events[name]] == [75 + ranks[name] + i for i in range(5)]
    assert is_clean(rig.engine)


def test_a_fault_of_every_sequence_ends_all_after_a_bounded_number_of_tries(rig: Rig) -> None:
    def fault(plan: StepPlan) -> None:
        raise RuntimeError("the memory is gone")

    rig.executor.fault = fault
    names = [f"{number}" for number in range(8)]
    for name in names:
        rig.engine.core.submit(_request(name))
    _, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert sorted(failed) == names
    assert len(rig.executor.plans) == 2 * len(names) - 1
    assert is_clean(rig.engine)


def test_an_error_that_concerns_the_whole_engine_is_not_tried_again(rig: Rig) -> None:
    def fault(plan: StepPlan) -> None:
        raise StepFailed("a process has ended")

    rig.executor.fault = fault
    for name in ("a", "b"):
        rig.engine.core.submit(_request(name))
    _, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert {str(error) for error in failed.values()} == {"a process has ended"}
    assert len(rig.executor.plans) == 1


def test_what_a_failed_sequence_wrote_is_never_shared(rig: Rig) -> None:
    prompt = tuple(range(10, 22))
    rig.executor.fault = _fails_with("bad")
    rig.engine.core.submit(_request("bad", prompt=prompt))
    rig.engine.core.submit(_request("good"))
    _, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert failed.keys() == {"bad"}
    rig.engine.core.submit(_request("later", prompt=prompt))
    events, _ = _run(rig.engine.core, rig.engine.wait_ready)
    assert events["later"][0].cached_tokens == 0


def test_the_model_answers_the_others_as_it_does_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    reverse = engine.store.registry.resolve("reverse")
    bad = (POISON, *range(40, 80))
    prompts = {"a": (BASE, tuple(range(60, 90))), "b": (reverse, tuple(range(70, 95))), "bad": (BASE, bad)}
    alone: dict[str, list[int | None]] = {}
    for name, (ref, prompt) in prompts.items():
        if name != "bad":
            engine.core.submit(_request(name, ref, prompt))
            alone[name] = [event.token_id for event in _run(engine.core, engine.wait_ready)[0][name]]
    forward = Llama.forward

    def faulty(model: Llama, batch: ForwardBatch, cache: KVCache) -> Tensor:
        logits = forward(model, batch, cache)
        if bool((batch.token_ids == POISON).any()):
            raise IndexError("index out of range in self")
        return logits

    monkeypatch.setattr(Llama, "forward", faulty)
    for name, (ref, prompt) in prompts.items():
        engine.core.submit(_request(name, ref, prompt))
    events, failed = _run(engine.core, engine.wait_ready)
    assert failed.keys() == {"bad"}
    assert {name: [event.token_id for event in of] for name, of in events.items()} == alone
    monkeypatch.undo()
    engine.core.submit(_request("bad", BASE, bad))
    events, failed = _run(engine.core, engine.wait_ready)
    assert not failed
    assert events["bad"][0].cached_tokens == 0
