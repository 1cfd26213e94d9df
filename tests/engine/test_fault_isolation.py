"""A step that raises ends the requests at fault; the others of its plan go on as if it had not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import AcceleratorError, Tensor

from engine import LLM
from engine.core import EngineCore
from engine.errors import EngineError, EngineStopped, StepFailed
from lora.adapter import BASE, AdapterRef
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from scheduler.plan import StepPlan, TokenEvent
from scheduler.request import Request, SamplingParams
from tests.engine.rig import Rig, build, is_clean

MAX_STEPS = 200
POISON = 200  # a token that no other prompt holds


WAYS = {"at launch": (False, "fault"), "ahead": (True, "fault"), "on reading": (True, "fault_on_read")}


@dataclass(frozen=True)
class FaultyRig(Rig):
    """A rig on a device that does not or does run behind, and the hook by which its steps are made to raise."""

    hook: str

    def fault(self, raises: Callable[[StepPlan], None]) -> None:
        """Call `raises` with the plan of each step, at the moment that is tested."""
        setattr(self.executor, self.hook, raises)


@pytest.fixture(params=WAYS)
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FaultyRig]:
    lags, hook = WAYS[request.param]
    made = build(tmp_path, lags=lags)
    yield FaultyRig(made.engine, made.executor, made.folders, hook)
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
    rig: FaultyRig, bad: tuple[str, ...], from_output: int
) -> None:
    low, high = rig.engine.store.registry.resolve("low"), rig.engine.store.registry.resolve("high")
    ranks = {"a": 0, "b": 8, "c": 24 - 26, "d": 0, "e": 8}
    rig.fault(_fails_with(*bad, from_output=from_output))
    for name, ref in zip(ranks, (BASE, low, high, BASE, low), strict=True):
        rig.engine.core.submit(_request(name, ref))
    events, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert failed.keys() == set(bad)
    assert all(isinstance(error, StepFailed) for error in failed.values())
    for name in ranks.keys() - set(bad):
        assert [event.token_id for event in events[name]] == [75 + ranks[name] + i for i in range(5)]
    assert is_clean(rig.engine)


def test_a_fault_of_every_sequence_ends_all_after_a_bounded_number_of_tries(rig: FaultyRig) -> None:
    names = [f"{number}" for number in range(8)]
    rig.fault(_fails_with(*names))
    for name in names:
        rig.engine.core.submit(_request(name))
    _, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert sorted(failed) == names
    ahead = rig.hook == "fault_on_read"  # one more step has been launched by then
    assert len(rig.executor.plans) == 2 * len(names) - 1 + ahead + 1, "the last one is of no sequence"
    assert is_clean(rig.engine)


@pytest.mark.parametrize("sequences", [1, 8])
def test_a_fault_that_no_sequence_causes_ends_the_engine(rig: FaultyRig, sequences: int) -> None:
    def fault(plan: StepPlan) -> None:
        raise RuntimeError("the memory is gone")

    rig.fault(fault)
    for number in range(sequences):
        rig.engine.core.submit(_request(f"{number}"))
    with pytest.raises(EngineStopped, match="RuntimeError"):
        _run(rig.engine.core, rig.engine.wait_ready)


def test_a_fault_that_passes_by_itself_ends_nobody(rig: FaultyRig) -> None:
    tried: list[StepPlan] = []

    def fault(plan: StepPlan) -> None:
        tried.append(plan)
        if len(tried) == 3:
            raise RuntimeError("the memory was short for a moment")

    rig.fault(fault)
    for name in ("a", "b"):
        rig.engine.core.submit(_request(name))
    events, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert not failed
    assert {name: [event.token_id for event in of] for name, of in events.items()} == {
        name: [75, 76, 77, 78, 79] for name in ("a", "b")
    }


def test_a_device_that_is_lost_while_the_parts_are_tried_ends_the_engine(rig: FaultyRig) -> None:
    def fault(plan: StepPlan) -> None:
        raise IndexError("index out of range") if len(plan.slices) > 1 else AcceleratorError("it asserted")

    rig.fault(fault)
    for name in ("a", "b"):
        rig.engine.core.submit(_request(name))
    with pytest.raises(AcceleratorError):
        _run(rig.engine.core, rig.engine.wait_ready)


def test_a_request_that_leaves_while_its_step_fails_is_tried_no_more(rig: FaultyRig) -> None:
    def fault(plan: StepPlan) -> None:
        if any(part.key.request_id == "bad" for part in plan.slices):
            rig.engine.core.abort("bad")
            raise IndexError("index out of range")

    rig.fault(fault)
    for name in ("bad", "a"):
        rig.engine.core.submit(_request(name))
    events, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert not failed
    assert [event.token_id for event in events["a"]] == [75, 76, 77, 78, 79]
    assert is_clean(rig.engine)


def test_an_error_that_concerns_the_whole_engine_is_not_tried_again(rig: FaultyRig) -> None:
    def fault(plan: StepPlan) -> None:
        raise StepFailed("a process has ended")

    rig.fault(fault)
    for name in ("a", "b"):
        rig.engine.core.submit(_request(name))
    _, failed = _run(rig.engine.core, rig.engine.wait_ready)
    assert {str(error) for error in failed.values()} == {"a process has ended"}
    assert len(rig.executor.plans) == 1 + (rig.hook == "fault_on_read")


def test_what_a_failed_sequence_wrote_is_never_shared(rig: FaultyRig) -> None:
    prompt = tuple(range(10, 22))
    rig.fault(_fails_with("bad"))
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
