"""Render chat templates with limits on processor time, memory and output.

One process of `engine.text.template_worker` does the work. It is started when first needed, and again after a
template has used up its limits. It ends with its owner: its socket closes then.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.text import template_worker

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
        self._worker: _Worker | None = None

    def render(
        self, template: str, variables: Mapping[str, object], most_chars: int = MOST_CHARS
    ) -> Rendered:
        """Render `template`. Raises InvalidChat if it refuses its variables, BrokenTemplate if it is unfit for any."""
        job = json.dumps({"template": template, "variables": variables, "most_chars": most_chars})
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = _Worker(self, self._most_cpu_s, self._most_bytes)
            try:
                answer = self._worker.ask(job.encode())
            except OSError:  # EOFError would be its end too; a socket tells it by sending nothing
                reason = self._worker.end()
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


class _Worker:
    """The process and the socket to it."""

    def __init__(self, owner: TemplateRenderer, most_cpu_s: float, most_bytes: int) -> None:
        self._most_cpu_s = most_cpu_s
        self._end, theirs = socket.socketpair()
        self._end.settimeout(_MOST_S)
        arguments = [theirs.fileno(), most_cpu_s, most_bytes]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(template_worker.__file__)), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's interrupt is for the first process, which ends this one
            )
        except OSError as error:
            self._end.close()
            raise EngineError(
                f"no process can be started to render a chat template ({error.strerror})"
            ) from error
        finally:
            theirs.close()
        self._finish = weakref.finalize(owner, _finish, self._process, self._end)

    def ask(self, job: bytes) -> dict[str, Any]:
        """Return the answer to a job. Raises OSError if the process ends instead, or gives none in time."""
        length = template_worker.LENGTH
        self._end.sendall(length.pack(len(job)) + job)
        return json.loads(self._receive(length.unpack(self._receive(length.size))[0]))

    def is_alive(self) -> bool:
        """Tell whether the process can answer; something else than a template may have ended it."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and wait until it has ended. From any thread, while another waits for an answer too."""
        self._process.kill()
        self._process.wait()

    def end(self) -> str:
        """End the process; return what was wrong with the template."""
        self._end.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)  # one that has been ended needs a moment until that shows
        code = self._process.poll()
        self._finish()
        if code == -signal.SIGPROF:
            return f"takes more than {self._most_cpu_s:g} s of processor time"
        return f"gives nothing within {_MOST_S:g} s" if code is None else "ends the process that renders it"

    def _receive(self, size: int) -> bytes:
        content = bytearray(size)
        filled = 0
        while filled < size:
            count = self._end.recv_into(memoryview(content)[filled:])
            if not count:
                raise ConnectionError("the worker has ended")
            filled += count
        return bytes(content)


def _finish(process: subprocess.Popen[bytes], end: socket.socket) -> None:
    end.close()
    process.kill()
    process.wait()


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
