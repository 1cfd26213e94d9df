"""Declare how a body offers tools and asks for calls of them, in OpenAI's words, and read what is asked.

A call that must be made is had by a form of the text: the arguments of one tool, or a list of calls. One that may be
made is found in what the model writes of itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from engine.api.tools.call_parser import CallParser, CallSyntax
from engine.structured.grammar_cache import JSON_WRITING
from engine.text.tool_syntax import ToolSyntax
from scheduler.parameter_checks import InvalidParameter
from scheduler.request import SamplingParams
from scheduler.structured_outputs import StructuredOutputsParams

MOST_TOOLS = 128
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class Function(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One tool on offer. A prompt's beginning is cached without a word."""

    function: Function
    type: Literal["function"] = "function"
    cache_control: Any = None


class FunctionName(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which function is to be called."""

    name: _Name


class NamedTool(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The one tool that has to be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class CalledFunction(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an assistant called, its arguments as the text of a JSON object."""

    name: _Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A call that an assistant made, as a conversation repeats it."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer may call tools of these names: `syntax` is how it writes the calls."""

    syntax: CallSyntax
    names: tuple[str, ...]
    parallel: bool = True

    def parser(self) -> CallParser:
        """Begin to read an answer."""
        return CallParser(self.syntax, self.names, self.parallel)


def asked_tools(
    params: SamplingParams,
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None,
    parallel: bool,
    syntax: ToolSyntax | None,
) -> tuple[ToolUse | None, SamplingParams]:
    """Return how the answer may call tools, if it may, and the parameters that make it do so, if it must.

    `syntax` is that of the model. Raises InvalidParameter that names the field.
    """
    tools = tools or ()
    _check(tools, choice)
    if not tools or choice == "none":
        return None, params
    names = tuple(tool.function.name for tool in tools)
    if isinstance(choice, NamedTool):  # a call has no text that response_format could speak of
        place = names.index(choice.function.name)
        field = f"tools[{place}].function.parameters"
        form = StructuredOutputsParams(json=_schema(tools[place]), given_as=field)
        return ToolUse("named", (choice.function.name,)), replace(params, structured_outputs=form)
    if choice == "required":
        form = StructuredOutputsParams(grammar=_list_of_calls(tools, parallel), given_as="tools")
        return ToolUse("list", names, parallel), replace(params, structured_outputs=form)
    if syntax is None:
        remedy = "how this model writes calls is not known: start the server with --tool-call-parser, or give required"
        raise InvalidParameter("tool_choice", "auto", remedy)
    if params.structured_outputs is not None:
        remedy = (
            "the answer is to have a form, which no call has: give none or required, or leave out the form"
        )
        raise InvalidParameter("tool_choice", "auto", remedy)
    if syntax == "mistral":  # its calls begin with a special token
        params = replace(params, skip_special_tokens=False)
    return ToolUse(syntax, names, parallel), params


def offered(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[dict[str, Any]] | None:
    """Return the tools as a chat template reads them; None if there are none, or none may be called."""
    if not tools or choice == "none":
        return None
    found: list[dict[str, Any]] = []
    for tool in tools:
        function: dict[str, Any] = {
            "name": tool.function.name,
            "description": tool.function.description or "",
            "parameters": _schema(tool),
        }
        found.append({"type": "function", "function": function})
    return found


def repeated_call(field: str, call: ToolCall) -> dict[str, Any]:
    """Return an assistant's call as a chat template reads it. Raises InvalidParameter that names `field`."""
    arguments: Any = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        remedy = "give the text of a JSON object"
        raise InvalidParameter(f"{field}.function.arguments", call.function.arguments, remedy)
    function: dict[str, Any] = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({} if call.id is None else {"id": call.id})


def _check(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    names = [tool.function.name for tool in tools]
    if len(names) > MOST_TOOLS:
        raise InvalidParameter("tools", f"{len(names)} entries", f"give at most {MOST_TOOLS}")
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise InvalidParameter("tools", twice, "two tools have this name: rename one of them")
    if choice == "required" and not tools:
        raise InvalidParameter("tool_choice", "required", "there are no tools: give some")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidParameter(
            "tool_choice.function.name", choice.function.name, "give the name of one of tools"
        )


def _schema(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are an object whatever it says."""
    least: dict[str, Any] = {"type": "object", "properties": {}}
    return least | (tool.function.parameters or {}) | {"type": "object"}


def _list_of_calls(tools: Sequence[Tool], parallel: bool) -> str:
    """Write the grammar of a JSON list of calls, of one call if not `parallel`."""
    rules = ['start: "[" call ("," " "? call)* "]"' if parallel else 'start: "[" call "]"']
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        head = json.dumps('{"name": ' + json.dumps(tool.function.name) + ', "parameters": ')
        written = json.dumps(_schema(tool) | {"x-guidance": JSON_WRITING})
        rules.append(f'call{i}: {head} arguments{i} "}}"\narguments{i}: %json {written}')
    return "\n".join(rules)
