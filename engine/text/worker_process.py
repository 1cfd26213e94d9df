"""Run a process of one's own that answers messages over a socket, and that may be ended at any time.

It ends with its owner: its socket closes then. Any thread may use it, one at a time.
"""

import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress

from engine.errors import EngineError
from engine.text.bounded_jobs import LENGTH

Content = bytes | bytearray | memoryview


class WorkerProcess:
    """A Python program and the socket to it. It is given its socket's descriptor as its first argument."""

    def __init__(
        self, owner: object, purpose: str, program: Sequence[str], arguments: Sequence[object], most_s: float
    ) -> None:
        """Start `program` for `owner`; any message has to be taken, or given, within `most_s`.

        Raises EngineError, which names the purpose, if no process can be started.
        """
        self._end, theirs = socket.socketpair()
        self._end.settimeout(most_s)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *program, str(theirs.fileno()), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's interrupt is for the first process, which ends this one
            )
        except OSError as error:
            self._end.close()
            raise EngineError(f"no process can be started to {purpose} ({error.strerror})") from error
        finally:
            theirs.close()
        self._finish = weakref.finalize(owner, _finish, self._process, self._end)

    def send(self, content: Content) -> None:
        """Send a message. Raises OSError if the process ends instead of taking it, or does not in time."""
        self._end.sendall(LENGTH.pack(len(content)))
        self._end.sendall(content)

    def receive(self) -> bytes:
        """Return the next message. Raises OSError if the process ends instead, or gives none in time."""
        return bytes(self._receive(LENGTH.unpack(self._receive(LENGTH.size))[0]))

    def is_alive(self) -> bool:
        """Tell whether the process can answer; something else than its work may have ended it."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and wait until it has ended. From any thread, while another waits for an answer too."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int | None:
        """End the process; return the exit code that it had already, or None if it still ran."""
        with suppress(
            subprocess.TimeoutExpired
        ):  # its socket is still open: one that runs is not to end by that
            self._process.wait(0.5)  # one that has been ended needs a moment until that shows
        code = self._process.poll()
        self._finish()
        return code

    def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        filled = 0
        while filled < size:
            count = self._end.recv_into(memoryview(content)[filled:])
            if not count:
                raise ConnectionError("the worker has ended")
            filled += count
        return content


def _finish(process: subprocess.Popen[bytes], end: socket.socket) -> None:
    end.close()
    process.kill()
    process.wait()
