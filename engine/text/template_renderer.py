"""Render chat templates with limits on processor time, memory and output.

One process of `engine.text.template_worker` does the work. It is started when first needed, and again after a
template has used up its limits. It ends with its owner: its socket closes then.
"""

import json
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.text import template_worker
from engine.text.worker_process import WorkerProcess

MOST_CHARS = 1 << 25
"""Characters of a rendered conversation where no prompt bounds it."""

_MOST_CPU_S = 2.0
_MOST_S = 30.0  # for an answer, on a machine that does much else
_MOST_BYTES = 1 << 30


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

    def __init__(self, most_cpu_s: float = _MOST_CPU_S, most_bytes: int = _MOST_BYTES) -> None:
        """Start nothing yet."""
        self._most_cpu_s, self._most_bytes = most_cpu_s, most_bytes
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None

    def render(
        self, template: str, variables: Mapping[str, object], most_chars: int = MOST_CHARS
    ) -> Rendered:
        """Render `template`. Raises InvalidChat if it refuses its variables, BrokenTemplate if it is unfit for any."""
        job = json.dumps({"template": template, "variables": variables, "most_chars": most_chars})
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = self._start()
            try:
                self._worker.send(job.encode())
                answer = json.loads(self._worker.receive())
            except OSError:
                reason = self._reason(self._worker.end())
                self._worker = None
                raise BrokenTemplate(
                    f"the chat template {reason}: simplify it, or give another one"
                ) from None
        text, length = _read(answer)
        return Rendered(length, text, most_chars)

    def close(self) -> None:
        """End the process, whatever it renders; a later render starts another."""
        if (worker := self._worker) is not None:
            worker.kill()

    def __reduce__(self) -> tuple[type["TemplateRenderer"], tuple[float, int]]:
        """Have another process that is sent this value start a process of its own."""
        return TemplateRenderer, (self._most_cpu_s, self._most_bytes)

    def _start(self) -> WorkerProcess:
        program, limits = [str(Path(template_worker.__file__))], [self._most_cpu_s, self._most_bytes]
        return WorkerProcess(self, "render a chat template", program, limits, _MOST_S)

    def _reason(self, code: int | None) -> str:
        """Say what was wrong with a template whose process has ended with `code`, or had to be ended."""
        if code == -signal.SIGPROF:
            return f"takes more than {self._most_cpu_s:g} s of processor time"
        return f"gives nothing within {_MOST_S:g} s" if code is None else "ends the process that renders it"


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
