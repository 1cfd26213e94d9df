"""Tools as OpenAI's own client offers them, and the calls as it reads them, over the real application."""

import json
from typing import Any

import jsonschema
import msgspec
import openai
import pytest

from engine import LLM, SamplingParams
from engine.api.tools.tool_fields import Tool, asked_tools
from engine.tokenizer import Tokenizer
from scheduler.structured_outputs import StructuredOutputsParams
from tests.engine.api.session import HI, session
from tests.engine.demo_llm import ASK
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}<{{ tool.function.name }}>{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{{ '\n' }}{% endfor %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "Tell the time."}}
TOOLS: Any = [WEATHER, CLOCK]
SAID = 'Look: <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def client(said: str) -> FakeClient:
    """A model that says this, whose template is that of one with tools."""
    made = FakeClient(Tokenizer(byte_tokenizer(TEMPLATE)))
    made.says = lambda model, prompt: said
    return made


async def test_a_model_may_call_tools_and_is_told_of_them() -> None:
    async with session(client(SAID)) as api:
        response = await api.openai.chat.completions.create(model="base", messages=HI, tools=TOOLS)
        (choice,) = response.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Look:"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
        assert call.id
        _, prompt, params = api.engine.submitted[0]
        assert api.engine.tokenizer.decode(prompt).startswith("<weather><clock>user: hi")
        assert params.structured_outputs is None


async def test_a_stream_of_calls_adds_up() -> None:
    async with session(client(SAID)) as api:
        stream = await api.openai.chat.completions.create(
            model="base", messages=HI, tools=TOOLS, stream=True, n=2
        )
        texts, names, arguments, ends = ["", ""], list[str](), ["", ""], list[str]()
        async for chunk in stream:
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                assert call.function is not None
                names += [call.function.name] if call.function.name else []
                arguments[choice.index] += call.function.arguments or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
        assert texts == ["Look:"] * 2
        assert names == ["weather"] * 2
        assert [json.loads(each) for each in arguments] == [{"city": "Oslo"}] * 2
        assert ends == ["tool_calls"] * 2


async def test_a_call_and_what_it_returned_go_through_the_template() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": 1}'}}
    messages: Any = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    async with session(client("It is noon.")) as api:
        response = await api.openai.chat.completions.create(model="base", messages=messages, tools=TOOLS)
        assert response.choices[0].message.content == "It is noon."
        assert response.choices[0].finish_reason == "stop"
        told = api.engine.tokenizer.decode(api.engine.submitted[0][1])
        assert told.endswith('assistant: <tool_call>clock{"zone": 1}</tool_call>\ntool: noon\n')
        messages[1]["tool_calls"][0]["function"]["arguments"] = "no object"
        with pytest.raises(openai.BadRequestError) as caught:
            await api.openai.chat.completions.create(model="base", messages=messages)
        assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


async def test_a_named_tool_has_to_be_called_and_its_arguments_have_their_schema() -> None:
    async with session(client('{"city": "Rome"}')) as api:
        named: Any = {"type": "function", "function": {"name": "weather"}}
        response = await api.openai.chat.completions.create(
            model="base", messages=HI, tools=TOOLS, tool_choice=named
        )
        (call,) = response.choices[0].message.tool_calls or []
        assert (call.type, call.function.name) == ("function", "weather")  # pyright: ignore[reportAttributeAccessIssue]
        assert response.choices[0].message.content is None
        (asked,) = [params.structured_outputs for _, _, params in api.engine.submitted]
        assert isinstance(asked, StructuredOutputsParams)
        assert json.loads(str(asked.json)) == WEATHER["function"]["parameters"]


async def test_without_a_choice_of_tools_the_answer_is_text_and_the_model_is_told_of_none() -> None:
    async with session(client(SAID)) as api:
        response = await api.openai.chat.completions.create(
            model="base", messages=HI, tools=TOOLS, tool_choice="none"
        )
        assert response.choices[0].message.content == SAID
        assert api.engine.tokenizer.decode(api.engine.submitted[0][1]) == "user: hi\n"


async def test_what_cannot_be_had_is_refused_by_its_field() -> None:
    form = {"type": "json_object"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "response_format": form}, "tool_choice"),
    ]
    async with session(client("")) as api:
        for fields, param in cases:
            answer = await api.post("/v1/chat/completions", {"model": "base", "messages": HI} | fields)
            assert (answer.status, answer.error["param"]) == (400, param), fields


@pytest.mark.parametrize("parallel", [True, False])
def test_a_form_makes_the_embedded_model_call_tools_with_arguments_of_their_schema(
    llm: LLM, parallel: bool
) -> None:
    schemas = {"weather": WEATHER["function"]["parameters"], "clock": {"additionalProperties": False}}
    offered = [{"function": {"name": name, "parameters": schema}} for name, schema in schemas.items()]
    tools = msgspec.convert(offered, list[Tool])
    params = SamplingParams(temperature=1, max_tokens=110, n=6, seed=3)
    use, params = asked_tools(params, tools, "required", parallel, None)
    assert use is not None
    found = 0
    for output in llm.chat([ASK], params)[0].outputs:
        if output.finish_reason != "stop":
            continue
        found += 1
        for call in json.loads(output.text):
            jsonschema.validate(call["parameters"], schemas[call["name"]])
        parser = use.parser()
        parser.push(output.text, final=True)
        assert parser.calls == len(json.loads(output.text)) == (parser.calls if parallel else 1)
    assert found
