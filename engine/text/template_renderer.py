"""Render chat templates in a process with limits on processor time and memory, and with one on output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.text import template_worker
from engine.text.bounded_process import MOST_BYTES, MOST_CPU_S, BeyondLimits, BoundedProcess

MOST_CHARS = 1 << 25
"""Characters of a rendered conversation where no prompt bounds it."""


class InvalidChat(EngineError):
    """The messages cannot be put through the chat template, or there is none."""


class BrokenTemplate(InvalidChat):
    """A chat template that renders nothing, whatever the messages: no Jinja, or a program without an end."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template made of a conversation: its length, and the text unless it has more than `most_chars`."""

    length: int
    text: str | None
    most_chars: int


class TemplateRenderer:
    """Renders one template at a time, from any thread."""

    def __init__(self, most_cpu_s: float = MOST_CPU_S, most_bytes: int = MOST_BYTES) -> None:
        """Start nothing yet."""
        self._process = BoundedProcess(
            "render a chat template", template_worker.__file__, most_cpu_s, most_bytes
        )

    def render(
        self, template: str, variables: Mapping[str, object], most_chars: int = MOST_CHARS
    ) -> Rendered:
        """Render `template`. Raises InvalidChat if it refuses its variables, BrokenTemplate if it is unfit for any."""
        try:
            answer = self._process.ask(
                {"template": template, "variables": variables, "most_chars": most_chars}
            )
        except BeyondLimits as error:
            raise BrokenTemplate(f"the chat template {error}: simplify it, or give another one") from None
        text, length = _read(answer)
        return Rendered(length, text, most_chars)

    def close(self) -> None:
        """End the process, whatever it renders; a later render starts another."""
        self._process.close()

    def __reduce__(self) -> tuple[type["TemplateRenderer"], tuple[float, int]]:
        """Have another process that is sent this value start a process of its own."""
        return TemplateRenderer, (self._process.most_cpu_s, self._process.most_bytes)


def _read(answer: Mapping[str, Any]) -> tuple[str | None, int]:
    """Return the text, if it is not too long, and its length. Raises as `TemplateRenderer.render`."""
    match answer:
        case {"text": str(text)}:
            return text, len(text)
        case {"length": int(length)}:
            return None, length
        case {"broken": reason}:
            raise BrokenTemplate(f"the chat template cannot be used, {reason}: mend it, or give another one")
        case _:
            raise InvalidChat(f"the chat template refuses these messages: {answer.get('refused')}")
