"""Processes as the system tells of them."""

import os
import select
from pathlib import Path

_PATIENCE_MS = 60_000


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that have not been waited for."""
    found = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for each in found for child in each]


class Watched:
    """A process that may end; told from another that gets its number."""

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
