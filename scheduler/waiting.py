"""WaitingSequences: the sequences that wait to run, in the order in which they are admitted."""

import math
from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from scheduler.sequence import Sequence

_ORDER = attrgetter("order")


class WaitingSequences:
    """A line of sequences: the preempted, then the rest by priority, deadline and arrival, then the background.

    The deadline is the request's `first_token_by_s`; what has none goes after what has one. Equals keep the order
    in which they came.
    """

    def __init__(self) -> None:
        self._line: list[Sequence] = []
        self._next_deadline_s = math.inf  # no request is late before

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        insort(self._line, sequence, key=_ORDER)
        by_s = sequence.request.first_token_by_s
        if by_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, by_s)

    def put_first(self, sequence: Sequence) -> None:
        """Put a sequence that was preempted before all others."""
        self._line.insert(0, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended without running."""
        self._line.remove(sequence)

    def drop_running(self) -> None:
        """Take out the sequences that run by now."""
        self._line = [sequence for sequence in self._line if not sequence.running]

    def late(self, now: float) -> tuple[str, ...]:
        """Return the requests that never began and should have drawn a token before `now`, in order."""
        if now <= self._next_deadline_s:
            return ()
        late: dict[str, None] = {}
        self._next_deadline_s = math.inf
        for sequence in self._line:
            by_s = sequence.request.first_token_by_s
            if by_s is None or sequence.has_begun:
                continue
            if by_s < now and not sequence.waits_for_sibling:
                late[sequence.key.request_id] = None
            self._next_deadline_s = min(self._next_deadline_s, by_s)
        return tuple(late)
