"""Tools offered to offline conversations: calls stand apart from text, one batch may have both."""

import json
from dataclasses import replace
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.offline.offered_tools import OfferedTools, with_calls
from engine.offline.result import CalledTool, Output, Result
from scheduler.plan import FinishReason
from scheduler.request import InvalidParameter
from tests.engine.demo_llm import ASK, GREEDY

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time", "parameters": CITY}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "time"}}


def test_a_call_that_must_be_made_is_made(llm: LLM) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=90, n=2)
    first, second = llm.chat(
        [ASK, ASK], params, ["reverse", None], tools=[WEATHER, TIME], tool_choice="required"
    )
    for output in (*first.outputs, *second.outputs):
        assert output.text == ""
        call = output.tool_calls[0]  # later ones may be cut off: a model of few words calls on and on
        assert call.name in ("weather", "time")
        assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_the_tool_that_is_named_is_called(llm: LLM) -> None:
    (result,) = llm.chat(ASK, replace(GREEDY, max_tokens=60), tools=[WEATHER, TIME], tool_choice=NAMED)
    ((call,),) = [output.tool_calls for output in result.outputs]
    assert call.name == "time"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_tools_that_may_not_be_called_change_nothing(llm: LLM) -> None:
    (plain,) = llm.chat(ASK, GREEDY, "reverse")
    (offered,) = llm.chat(ASK, GREEDY, "reverse", tools=[WEATHER], tool_choice="none")
    assert offered.outputs == plain.outputs
    assert plain.outputs[0].tool_calls == ()


def test_text_and_calls_in_a_models_own_syntax_are_parted() -> None:
    text = 'See: <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    output = Output(0, text, (1, 2), FinishReason.STOP, ())
    use, _ = OfferedTools.of([WEATHER], None).asked(SamplingParams(), _Hermes())  # type: ignore[arg-type]
    (read,) = with_calls(Result((1,), (output,), (), 0, ()), use).outputs
    assert read.text == "See:"
    assert read.tool_calls == (CalledTool("weather", '{"city": "Rome"}'),)


class _Hermes:
    """What is asked of a tokenizer."""

    tool_syntax = "hermes"


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ([{"type": "function"}], None, "tools"),
        ("weather", None, "tools"),
        ([WEATHER, WEATHER], "required", "tools"),
        ([WEATHER], "always", "tool_choice"),
        ([], "required", "tool_choice"),
        ([WEATHER], NAMED, "tool_choice.function.name"),
        ([WEATHER], "auto", "tool_choice"),
    ],
)
def test_what_is_no_offer_names_the_field(llm: LLM, tools: Any, choice: Any, field: str) -> None:
    with pytest.raises(InvalidParameter) as refusal:
        llm.chat(ASK, GREEDY, tools=tools, tool_choice=choice)
    assert refusal.value.field == field
