"""Offer tools to offline conversations as /v1/chat/completions does, and find the calls in their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engine.api.tools.call_parser import CallPiece
from engine.api.tools.tool_fields import Tool, ToolChoice, ToolUse, asked_tools, offered
from engine.offline.result import CalledTool, Result
from engine.tokenizer import Tokenizer
from scheduler.request import InvalidParameter, SamplingParams


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The tools of some conversations, and which of them have to be called."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice | None = None

    @classmethod
    def of(cls, tools: object, choice: object) -> "OfferedTools":
        """Read what a caller gives in OpenAI's form. Raises InvalidParameter that names the field."""
        return cls(
            _converted("tools", tools or (), tuple[Tool, ...]),
            _converted("tool_choice", choice, ToolChoice | None),
        )

    @property
    def told(self) -> Sequence[Mapping[str, Any]] | None:
        """The tools as a chat template reads them; None if none may be called."""
        return offered(self.tools, self.choice)

    def asked(self, params: SamplingParams, tokenizer: Tokenizer) -> tuple[ToolUse | None, SamplingParams]:
        """Return how an answer may call tools, and the parameters that make it. Raises InvalidParameter."""
        return asked_tools(params, self.tools, self.choice, True, tokenizer.tool_syntax)


def with_calls(result: Result, use: ToolUse | None) -> Result:
    """Part the texts of answers from their calls of tools."""
    if use is None:
        return result
    read = [(output, *_read(output.text, use)) for output in result.outputs]
    return replace(result, outputs=tuple(replace(o, text=text, tool_calls=calls) for o, text, calls in read))


def _read(text: str, use: ToolUse) -> tuple[str, tuple[CalledTool, ...]]:
    """Return the text of a whole answer that is no call, and its calls."""
    rest, names, arguments = "", dict[int, str](), dict[int, str]()
    for piece in use.parser().push(text, final=True):
        match piece:
            case CallPiece(index=index, name=name):
                if name is not None:
                    names[index] = name
                arguments[index] = arguments.get(index, "") + piece.arguments
            case str():
                rest += piece
    return rest, tuple(CalledTool(name, arguments[index]) for index, name in names.items())


def _converted(field: str, value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, from_attributes=False)
    except msgspec.ValidationError as error:
        raise InvalidParameter(field, value, f"{error}: give it as /v1/chat/completions takes it") from None
