"""Run one pull through UCX, from its first read until the destination is settled. A read cannot be stopped once begun.

`pair` lays one sequence of spans over another of the same total.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from transport.control.connection import Connection, Deadline
from transport.errors import PullTimeout
from transport.memory.destinations import Destination
from transport.paths.nixl_agent import ReadState


class Span(NamedTuple):
    """`nbytes` at `address`."""

    address: int
    nbytes: int


def pair(source: Sequence[Span], target: Sequence[Span], most_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(source address, target address, bytes) of pieces of at most `most_bytes`, in order, none crossing a border."""
    assert sum(span.nbytes for span in source) == sum(span.nbytes for span in target)
    targets = iter(target)
    to, room = next(targets)
    for start, left in source:
        address = start
        while left:
            if not room:
                to, room = next(targets)
            nbytes = min(left, room, most_bytes)
            yield address, to, nbytes
            address, to, left, room = address + nbytes, to + nbytes, left - nbytes, room - nbytes


SHORTEST_NAP_S = 20e-6
LONGEST_NAP_S = 2e-3
NAPS_PER_WAIT = 20  # so that a read is seen to have ended at most a twentieth too late
REAPER_NAP_S = 0.05


class Reading(Protocol):
    """A read that has begun; it can be waited for, not stopped."""

    def outcome(self) -> ReadState:
        """How it stands."""
        ...

    def release(self) -> None:
        """Give it back, once it has ended."""
        ...


class UcxRead:
    """Watches the reads of one pull in the thread that makes it, and those it gave up in a thread of their own."""

    def __init__(self, landing: Destination, channel: Connection, deadline: Deadline) -> None:
        self.channel = channel
        self._landing = landing
        self._deadline = deadline
        self._running: tuple[Reading, Callable[[], None]] | None = None

    def complete(self, read: Reading, ended: Callable[[], None]) -> bool:
        """Wait for `read`; False if it failed. `ended` is called when it has, even if the flight is given up before.

        PullTimeout at the deadline; LeaseExpired or PeerGone when the source says so, or nothing any more.
        """
        self._running = read, ended
        began_s = time.monotonic()
        while (outcome := read.outcome()) is ReadState.RUNNING:
            waited_s = time.monotonic() - began_s
            self.wait(min(LONGEST_NAP_S, SHORTEST_NAP_S + waited_s / NAPS_PER_WAIT))
        self._running = None
        read.release()
        ended()
        return outcome is ReadState.DONE

    def wait(self, nap_s: float) -> None:
        """Pause, unless the pull is over."""
        self.check()
        time.sleep(nap_s)

    def check(self) -> None:
        """PullTimeout after the deadline; LeaseExpired or PeerGone when the source says so, or nothing any more."""
        if self._deadline.passed():
            raise PullTimeout(f"{self.channel.peer}: no bytes in time; use another source or allow more")
        if not self.channel.is_quiet():
            self.channel.receive(self._deadline)  # raises what the source has to say, or that it hung up

    def land(self) -> None:
        """End the landing now, or as soon as the read that is still running has ended."""
        if self._running is None:
            self._landing.end()
            return
        self._landing.quarantine()
        threading.Thread(target=self._reap, args=self._running, name="transport-reap", daemon=True).start()

    def _reap(self, read: Reading, ended: Callable[[], None]) -> None:
        while read.outcome() is ReadState.RUNNING:
            time.sleep(REAPER_NAP_S)
        read.release()
        ended()
        self._landing.end()
