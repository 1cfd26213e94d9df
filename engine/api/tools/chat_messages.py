"""Declare the messages of a body, and turn them into what a chat template reads, the calls of tools among them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from engine.api.tools.tool_fields import ToolCall, repeated_call

Label = Annotated[str, msgspec.Meta(max_length=512)]
_EMPTY = msgspec.Meta(max_length=0)
Nothing = Annotated[list[Any], _EMPTY] | Annotated[str, _EMPTY] | Annotated[dict[str, Any], _EMPTY] | None
"""Null, or an empty list, text or object: what a field that is not implemented may hold within a message."""


class TextPart(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A part of a message; only text is implemented. Beginnings are cached without a word."""

    type: Literal["text"]
    text: str
    annotations: Nothing = None
    cache_control: Any = None


class Message(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation; the last group is what clients send back of answers.

    An assistant's message may have no content. What a tool returned names the call by `tool_call_id`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Label | None = None
    id: Label | None = None
    cache_control: Any = None
    tool_calls: list[ToolCall] | Annotated[str, _EMPTY] | Annotated[dict[str, Any], _EMPTY] | None = None
    tool_call_id: Label | Annotated[list[Any], _EMPTY] | Annotated[dict[str, Any], _EMPTY] | None = None

    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    images: Nothing = None
    tools: Nothing = None
    function_call: Nothing = None
    parsed: Nothing = None
    reasoning: Nothing = None
    reasoning_content: Nothing = None
    reasoning_details: Nothing = None
    thinking_blocks: Nothing = None
    provider_specific_fields: Nothing = None
    prefix: Literal[False] | None = None

    def __post_init__(self) -> None:
        """Refuse a message without content in the words of a field that is missing."""
        if self.content is None and self.role != "assistant":
            raise ValueError("Object missing required field `content`")
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                raise ValueError(f"{field} is of use in a message of role {role} only: leave it out")


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages to what a chat template reads. Raises InvalidParameter for calls whose arguments are no object.

    `developer` is what OpenAI now calls `system`; text parts are joined by line breaks.
    """
    return [_template_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _template_message(field: str, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    written: dict[str, Any] = {"role": role, "content": text}
    if message.name is not None:
        written["name"] = message.name
    if isinstance(message.tool_calls, list) and message.tool_calls:
        calls = enumerate(message.tool_calls)
        written["tool_calls"] = [repeated_call(f"{field}.tool_calls[{i}]", call) for i, call in calls]
    if message.tool_call_id:
        written["tool_call_id"] = message.tool_call_id
    return written
