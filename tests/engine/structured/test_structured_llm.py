"""Structured output on the embedded model: beside all else that a request may ask for, and in one batch with others."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.runner.token_masks import TokenMasks
from engine.structured.grammar import GrammarMatcher
from scheduler.plan import FinishReason
from scheduler.request import InvalidParameter
from tests.engine.demo_llm import ASK, GREEDY

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORM = StructuredOutputsParams(json=SCHEMA)
WARM = SamplingParams(temperature=1, seed=7, max_tokens=100, structured_outputs=FORM)


def fits(text: str) -> bool:
    value: Any = json.loads(text)
    return set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "yy")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 3},
        {"temperature": 0},
        {"presence_penalty": 1.5, "repetition_penalty": 1.3},
        {"top_k": 2, "top_p": 0.5, "min_p": 0.2},
        {"logit_bias": ((5, 50.0),)},
        {"logprobs": 3},
    ],
    ids=str,
)
def test_whatever_else_is_asked_for_the_text_has_its_form(llm: LLM, changes: dict[str, Any]) -> None:
    (result,) = llm.chat([ASK], replace(WARM, **changes), adapters="reverse")
    for output in result.outputs:
        assert fits(output.text), output.text
        assert output.finish_reason is FinishReason.STOP
        assert len(output.logprobs) in (0, len(output.token_ids))


def test_a_stop_token_is_not_drawn_where_the_form_goes_on_without_it(llm: LLM) -> None:
    (stop,) = llm.engine.tokenizer.encode("x", add_special=False)
    params = [replace(WARM, seed=seed, stop_token_ids=(stop,)) for seed in range(3)]
    for result in llm.chat([ASK] * 3, params):
        assert fits(result.outputs[0].text)
        assert "x" not in result.outputs[0].text


def test_the_same_seed_gives_the_same_text(llm: LLM) -> None:
    first, second = (llm.chat([ASK], WARM)[0].outputs[0].token_ids for _ in range(2))
    assert first == second


def test_a_text_that_is_cut_short_ends_by_its_length(llm: LLM) -> None:
    (result,) = llm.chat([ASK], replace(WARM, max_tokens=2))
    assert result.outputs[0].finish_reason is FinishReason.LENGTH


def test_tokens_that_must_follow_the_form_are_end_tokens(llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=("ab",)))
    for changes, reason in (({"ignore_eos": True}, "length"), ({"min_tokens": 11}, "stop")):
        (output,) = llm.chat([ASK], replace(params, **changes))[0].outputs
        assert (output.text, len(output.token_ids), output.finish_reason.value) == ("ab", 12, reason)


def test_rows_without_a_form_draw_what_they_draw_alone_and_cost_no_mask(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    allowed = GrammarMatcher.allowed

    def counted(matcher: GrammarMatcher, may_end: bool) -> Any:
        asked.append(1)
        return allowed(matcher, may_end)

    monkeypatch.setattr(GrammarMatcher, "allowed", counted)
    free = SamplingParams(temperature=1, seed=3, max_tokens=20)
    alone = llm.chat([ASK], free)[0].outputs[0].token_ids
    assert not asked
    with_form, without = llm.chat([ASK, ASK], [WARM, free])
    assert fits(with_form.outputs[0].text)
    assert without.outputs[0].token_ids == alone
    assert len(asked) == len(with_form.outputs[0].token_ids)


def test_a_form_outlives_preemption() -> None:
    several = [replace(WARM, seed=seed) for seed in range(6)]

    def answers(room: dict[str, Any]) -> tuple[Sequence[tuple[int, ...]], int]:
        with LLM(max_model_len=128, loras={}, self_test=False, **room) as llm:
            texts = [result.outputs[0] for result in llm.chat([ASK] * 6, several)]
            assert all(fits(output.text) for output in texts)
            return [output.token_ids for output in texts], llm.engine.core.live().preemptions

    roomy, none = answers({"kv_cache_bytes": "8MiB"})
    tight, some = answers({"kv_cache_bytes": 256 * 1024, "block_size": 4})
    assert none == 0 < some
    assert tight == roomy


def test_what_cannot_be_had_is_refused_before_anything_runs(llm: LLM) -> None:
    bad = replace(GREEDY, structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(InvalidParameter, match=r"^structured_outputs\.regex="):
        llm.chat([ASK, ASK], [WARM, bad])
    assert llm.engine.core.num_live_requests == 0


@pytest.mark.parametrize("given", [{"json": {}}, "{}", True], ids=repr)
def test_what_is_no_structured_outputs_params_is_refused(given: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"^structured_outputs="):
        SamplingParams(structured_outputs=given)


def test_matchers_of_sequences_that_have_left_are_forgotten(llm: LLM) -> None:
    masks = TokenMasks()
    executor: Any = llm.engine.core._executor  # pyright: ignore[reportPrivateUsage]
    kept, executor._masks = executor._masks, masks
    short = StructuredOutputsParams(regex="[a-f]{2}")
    try:
        for seed in range(12):
            (output,) = llm.chat([ASK], replace(WARM, seed=seed, structured_outputs=short))[0].outputs
            assert re.fullmatch("[a-f]{2}", output.text)
        assert len(masks) < 8
    finally:
        executor._masks = kept
