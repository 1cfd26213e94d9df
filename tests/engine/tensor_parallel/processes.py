"""Find worker processes, and wait for a process to end."""

import os
import select
from pathlib import Path

_PATIENCE_MS = 60_000


def workers_of(pid: int) -> list[int]:
    """Find the workers that `pid` started and that still run; it may have started other processes too."""
    listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    found = [int(child) for each in listed for child in each]
    return [
        child
        for child in found
        if b"engine.tensor_parallel.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


class Watched:
    """A process that may end; another that gets its number is not mistaken for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)

    def wait(self) -> bool:
        """Whether it ended within a minute. Call once."""
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        try:
            return bool(poll.poll(_PATIENCE_MS))
        finally:
            os.close(self._handle)
