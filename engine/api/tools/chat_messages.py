"""Turn the messages of a body into what a chat template reads, the calls of tools among them."""

from collections.abc import Sequence
from typing import Any

from engine.api import schema
from engine.api.tools.tool_fields import repeated_call


def chat_messages(messages: Sequence[schema.Message]) -> list[dict[str, Any]]:
    """Convert messages to what a chat template reads. Raises InvalidParameter for calls whose arguments are no object.

    `developer` is what OpenAI now calls `system`; text parts are joined by line breaks.
    """
    return [_template_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _template_message(field: str, message: schema.Message) -> dict[str, Any]:
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
