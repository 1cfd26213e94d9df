"""Run one pull through UCX, from its first read until its destination has ended.

A read that has begun cannot be stopped.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from transport.control.connection import Connection, Deadline
from transport.errors import PullTimeout
from transport.memory.destinations import Destination
from transport.paths.nixl_agent import ReadState

SHORTEST_PAUSE_S = 20e-6
LONGEST_PAUSE_S = 2e-3
PAUSES_PER_WAIT = 20  # so that a read is seen to have ended at most a twentieth too late
ABANDONED_PAUSE_S = 0.05


class RunningRead(Protocol):
    """A read that has begun; it can be waited for, not stopped."""

    def state(self) -> ReadState:
        """Tell how it stands."""
        ...

    def release(self) -> None:
        """Give it back, once it has ended."""
        ...


class UcxRead:
    """Watches the reads of one pull in the thread that makes it, and those it gave up in a thread of their own."""

    def __init__(self, destination: Destination, connection: Connection, deadline: Deadline) -> None:
        self.connection = connection
        self._destination = destination
        self._deadline = deadline
        self._running: tuple[RunningRead, Callable[[], None]] | None = None

    def complete(self, read: RunningRead, ended: Callable[[], None]) -> bool:
        """Wait for `read`; False if it failed. `ended` is called when it has, even if the pull is given up before.

        Raises PullTimeout at the deadline; LeaseExpired or PeerGone when the source says so or hangs up.
        """
        self._running = read, ended
        began_s = time.monotonic()
        while (state := read.state()) is ReadState.RUNNING:
            waited_s = time.monotonic() - began_s
            self.wait(min(LONGEST_PAUSE_S, SHORTEST_PAUSE_S + waited_s / PAUSES_PER_WAIT))
        self._running = None
        read.release()
        ended()
        return state is ReadState.DONE

    def wait(self, pause_s: float) -> None:
        """Pause, unless the pull is over."""
        self.check()
        time.sleep(pause_s)

    def check(self) -> None:
        """Raise PullTimeout after the deadline; LeaseExpired or PeerGone when the source says so or hangs up."""
        if self._deadline.passed():
            raise PullTimeout(f"{self.connection.peer}: no bytes in time; use another source or allow more")
        if not self.connection.is_quiet():
            self.connection.receive(self._deadline)  # raises what the source has to say, or that it hung up

    def end(self) -> None:
        """End the destination now, or as soon as the read that is still running has ended."""
        if self._running is None:
            self._destination.end()
            return
        self._destination.quarantine()
        threading.Thread(
            target=self._watch, args=self._running, name="transport-abandoned", daemon=True
        ).start()

    def _watch(self, read: RunningRead, ended: Callable[[], None]) -> None:
        while read.state() is ReadState.RUNNING:
            time.sleep(ABANDONED_PAUSE_S)
        read.release()
        ended()
        self._destination.end()
