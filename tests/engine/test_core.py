"""The step loop: requests end, faults stay with the requests they belong to, nothing is left behind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import AdapterFailed, NotInTime, StepFailed
from engine.step_result import StepResult
from lora.adapter import BASE, AdapterRef
from lora.errors import UnknownAdapter
from scheduler.limits import RequestRefused
from scheduler.plan import PENDING, StepPlan
from scheduler.request import InvalidParameter, Request, SamplingParams
from tests.engine.rig import VOCAB_SIZE, Rig, build, is_clean

MAX_STEPS = 200


@pytest.fixture(params=[False, True], ids=["computed at once", "lagging"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = build(tmp_path, lags=request.param)
    yield made
    made.engine.core.wait_for_step()
    made.engine.store.close()


def _request(
    name: str, adapter: AdapterRef = BASE, prompt: tuple[int, ...] = (7, 8, 9), **params: int
) -> Request:
    chosen = SamplingParams(seed=1, **({"max_tokens": 5} | params))  # pyright: ignore[reportArgumentType]
    return Request(name, prompt, adapter, chosen, (2,), 0.0)


def _run(rig: Rig) -> list[StepResult]:
    """Step until nothing lives."""
    results: list[StepResult] = []
    for _ in range(MAX_STEPS):
        if not rig.engine.core.num_live_requests:
            return results
        result = rig.engine.core.step()
        results.append(result)
        if result.idle:
            rig.engine.wait_ready()
    raise AssertionError(f"still {rig.engine.core.live()} after {MAX_STEPS} steps")


def _tokens(results: list[StepResult]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for event in (event for result in results for event in result.events):
        if event.token_id is not None:
            tokens.setdefault(event.key.request_id, []).append(event.token_id)
    return tokens


def test_requests_of_different_adapters_run_together_to_their_ends(rig: Rig) -> None:
    low, high = rig.engine.store.registry.resolve("low"), rig.engine.store.registry.resolve("high")
    for name, ref in (("a", BASE), ("b", low), ("c", high)):
        rig.engine.core.submit(_request(name, ref))
    tokens = _tokens(_run(rig))
    assert tokens == {
        name: [75 + rank + i for i in range(5)] for name, rank in (("a", 0), ("b", 8), ("c", 24 - 26))
    }
    assert any(len(plan.adapters) == 2 for plan in rig.executor.plans)
    assert is_clean(rig.engine)


def test_an_abort_between_steps_frees_everything(rig: Rig) -> None:
    rig.engine.core.submit(_request("a", n=3))
    rig.engine.core.step()
    rig.engine.core.abort("a")
    rig.engine.core.abort("a")
    assert is_clean(rig.engine)


def test_a_refused_request_leaves_no_trace(rig: Rig) -> None:
    with pytest.raises(RequestRefused, match="maximum context length is 128 tokens"):
        rig.engine.core.submit(_request("a", rig.engine.store.registry.resolve("low"), prompt=(5,) * 127))
    assert is_clean(rig.engine)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**40])
@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "logit_bias"])
def test_a_token_that_the_model_does_not_have_is_refused_by_its_field(
    rig: Rig, field: str, token_id: int
) -> None:
    prompt = (5, token_id) if field == "prompt" else (5,)
    params = SamplingParams(
        seed=1,
        stop_token_ids=(3, token_id) if field == "stop_token_ids" else (),
        logit_bias=((3, 1.0), (token_id, 1.0)) if field == "logit_bias" else (),
    )
    with pytest.raises(InvalidParameter, match=f"^{field}={token_id} .* from 0 to {VOCAB_SIZE - 1}"):
        rig.engine.core.submit(Request("a", prompt, BASE, params, (2,), 0.0))
    assert rig.executor.plans == []
    assert is_clean(rig.engine)


def test_an_end_token_that_can_never_be_drawn_is_never_banned(rig: Rig) -> None:
    params = SamplingParams(seed=1, max_tokens=5, min_tokens=4)
    rig.engine.core.submit(Request("a", (7, 8), BASE, params, (2, VOCAB_SIZE), 0.0))
    assert len(_tokens(_run(rig))["a"]) == 5
    assert {part.request.eos_token_ids for plan in rig.executor.plans for part in plan.slices} == {(2,)}


def test_a_request_that_waits_past_its_first_tokens_deadline_is_refused_for_now(rig: Rig) -> None:
    late, moved = (replace(_request(name), first_token_by_s=-1.0) for name in ("a", "b"))
    rig.engine.core.submit(late)
    rig.engine.core.submit(replace(moved, drawn_token_ids=(75,)))
    results = _run(rig)
    (failure,) = [failure for result in results for failure in result.failures]
    assert failure.request_id == "a"
    assert isinstance(failure.error, NotInTime)
    assert _tokens(results) == {"b": [76, 77, 78, 79]}
    assert is_clean(rig.engine)


@pytest.mark.parametrize("drawn", [(-1,), (75, VOCAB_SIZE)])
def test_a_token_drawn_elsewhere_that_the_model_does_not_have_is_refused(
    rig: Rig, drawn: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidParameter, match=r"^drawn_token_ids=.* give token ids from 0"):
        rig.engine.core.submit(replace(_request("a"), drawn_token_ids=drawn))
    assert is_clean(rig.engine)


def test_content_that_is_gone_cannot_be_asked_for(rig: Rig) -> None:
    ref = rig.engine.store.registry.resolve("low")
    rig.engine.store.registry.unload("low")
    with pytest.raises(UnknownAdapter, match="low"):
        rig.engine.core.submit(_request("a", ref))
    assert is_clean(rig.engine)


def test_a_step_that_raises_ends_its_requests_and_the_next_ones_run(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(plan: StepPlan) -> None:
        if any(part.key.request_id == "a" for part in plan.slices):
            raise RuntimeError("the device caught fire")

    rig.executor.fault = fault
    rig.engine.core.submit(_request("a", rig.engine.store.registry.resolve("low"), n=2))
    failures = [failure for result in _run(rig) for failure in result.failures]
    assert [failure.request_id for failure in failures] == ["a"]
    assert isinstance(failures[0].error, StepFailed)
    assert "the device caught fire" in caplog.text
    assert is_clean(rig.engine)
    rig.engine.core.submit(_request("b"))
    assert len(_tokens(_run(rig))["b"]) == 5


def test_a_sequence_with_unsound_logits_fails_alone(rig: Rig) -> None:
    rig.executor.invalid = lambda part: part.key.request_id == "a" and part.output_index == 2
    rig.engine.core.submit(_request("a"))
    rig.engine.core.submit(_request("b"))
    results = _run(rig)
    assert [failure.request_id for result in results for failure in result.failures] == ["a"]
    assert {name: len(tokens) for name, tokens in _tokens(results).items()} == {"a": 2, "b": 5}
    assert is_clean(rig.engine)


def test_an_adapter_that_cannot_be_brought_back_fails_its_requests_only(tmp_path: Path) -> None:
    rig = build(tmp_path, adapter_pages=36, cache=tmp_path / "cache")  # room for one adapter
    store = rig.engine.store
    low, high = store.registry.resolve("low"), store.registry.resolve("high")
    assert low.digest in store.ready()
    for packed in (tmp_path / "cache").iterdir():
        packed.unlink()
    for folder in rig.folders.values():
        (folder / "adapter_model.safetensors").write_bytes(b"torn")
    rig.engine.core.submit(_request("lost", high))
    rig.engine.core.submit(_request("base"))
    results = _run(rig)
    failures = [failure for result in results for failure in result.failures]
    assert [failure.request_id for failure in failures] == ["lost"]
    assert isinstance(failures[0].error, AdapterFailed)
    assert len(_tokens(results)["base"]) == 5
    assert is_clean(rig.engine)
    store.close()


def test_a_lagging_device_has_the_next_step_before_it_is_asked_for_the_last(tmp_path: Path) -> None:
    rig = build(tmp_path, lags=True)
    rig.engine.core.submit(_request("a"))
    assert rig.engine.core.step().events == ()
    for _ in range(4):
        launched = len(rig.executor.plans)
        assert len(rig.engine.core.step().events) == 1
        assert len(rig.executor.plans) == launched + 1 or launched == 5
    assert [plan.slices[0].token_ids for plan in rig.executor.plans[1:]] == [(PENDING,)] * 4
    assert _tokens(_run(rig)) == {"a": [79]}
    assert is_clean(rig.engine)
    rig.engine.store.close()


def test_a_draw_that_needs_the_last_token_waits_for_it_and_loses_no_step(tmp_path: Path) -> None:
    rig = build(tmp_path, lags=True)
    rig.engine.core.submit(_request("a", presence_penalty=1))
    results = _run(rig)
    assert _tokens(results) == {"a": [75, 76, 77, 78, 79]}
    assert len(rig.executor.plans) == 5
    assert all(PENDING not in plan.slices[0].token_ids for plan in rig.executor.plans)
    rig.engine.store.close()


def test_a_step_that_raises_leaves_the_sequences_of_the_next_one_that_are_not_its_own(tmp_path: Path) -> None:
    rig = build(tmp_path, lags=True)
    spoilt: list[StepPlan] = []

    def fault(plan: StepPlan) -> None:
        spoilt.append(plan)
        if plan is spoilt[0]:
            raise RuntimeError("the device lost a step")

    rig.executor.fault_on_read = fault
    rig.engine.core.submit(_request("a"))
    rig.engine.core.step()
    rig.engine.core.submit(_request("b"))
    results = _run(rig)
    assert [failure.request_id for result in results for failure in result.failures] == ["a"]
    assert len(_tokens(results)["b"]) == 5
    assert is_clean(rig.engine)
    rig.engine.store.close()
