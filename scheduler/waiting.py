"""WaitingSequences: the sequences that wait to run, in the order in which they are admitted."""

import math
from bisect import insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import chain
from operator import attrgetter

from scheduler.sequence import Order, Sequence
from scheduler.tenant_turns import TenantTurns

_ORDER = attrgetter("order")
_ALL = ""  # whose line it is where tenants have no turns
_Band = tuple[int, int]


class WaitingSequences:
    """Lines of sequences: the preempted, then the rest by priority, deadline and arrival, then the background.

    The deadline is the request's `first_token_by_s`; what has none goes after what has one. Equals keep the order
    in which they came. Where tenants have turns, theirs come after the priority, and each has a line of its own.
    """

    def __init__(self, turns: TenantTurns) -> None:
        self._turns = turns
        self._bands: dict[_Band, dict[str, list[Sequence]]] = {}  # by kind and priority, then by tenant
        self._next_deadline_s = math.inf  # no request is late before

    def __len__(self) -> int:
        return sum(len(line) for band in self._bands.values() for line in band.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Go through all in their order. What is admitted on the way is charged to its tenant."""
        return chain.from_iterable(self._in_turn(self._bands[band]) for band in sorted(self._bands))

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        insort(self._line(sequence), sequence, key=_ORDER)
        by_s = sequence.request.first_token_by_s
        if by_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, by_s)

    def put_first(self, sequence: Sequence) -> None:
        """Put a sequence that was preempted before all others."""
        self._line(sequence).insert(0, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended without running."""
        self._line(sequence).remove(sequence)
        self._forget_empty()

    def drop_running(self) -> None:
        """Take out the sequences that run by now."""
        for band in self._bands.values():
            for tenant, line in band.items():
                band[tenant] = [sequence for sequence in line if not sequence.running]
        self._forget_empty()

    def drew(self, sequence: Sequence) -> None:
        """Take in that a sequence, which does not wait any more, drew a token."""
        if self._turns.is_on:
            self._turns.charge(sequence.request.tenant, 1)

    def late(self, now: float) -> tuple[str, ...]:
        """Return the requests that never began and should have drawn a token before `now`, in order."""
        if now <= self._next_deadline_s:
            return ()
        late: dict[str, None] = {}
        self._next_deadline_s = math.inf
        for sequence in self:
            by_s = sequence.request.first_token_by_s
            if by_s is None or sequence.has_begun:
                continue
            if by_s < now and not sequence.waits_for_sibling:
                late[sequence.key.request_id] = None
            self._next_deadline_s = min(self._next_deadline_s, by_s)
        return tuple(late)

    def _line(self, sequence: Sequence) -> list[Sequence]:
        """Return the line that a sequence stands in, or is to."""
        kind, priority, *_ = sequence.order
        lines = self._bands.setdefault((kind, priority), {})
        has_turn = self._turns.is_on and kind > 0
        tenant = sequence.request.tenant if has_turn else _ALL
        if tenant not in lines:
            if has_turn:
                self._turns.join(tenant, lines)
            lines[tenant] = []
        return lines[tenant]

    def _in_turn(self, lines: dict[str, list[Sequence]]) -> Iterator[Sequence]:
        turns = self._turns
        if not turns.is_on:
            yield from chain.from_iterable(lines.values())
            return
        heads: list[tuple[float, Order, str, int]] = [
            (turns.given(tenant), line[0].order, tenant, 0) for tenant, line in lines.items()
        ]
        heapify(heads)
        while heads:
            _, _, tenant, at = heappop(heads)
            for after, sequence in enumerate(
                lines[tenant][at:], at + 1
            ):  # its turn lasts until it is charged
                is_new = not sequence.has_begun
                yield sequence
                if sequence.running and is_new:
                    turns.admitted(tenant, sequence.total_tokens - sequence.computed_tokens)
                    if after < len(lines[tenant]):
                        heappush(heads, (turns.given(tenant), lines[tenant][after].order, tenant, after))
                    break

    def _forget_empty(self) -> None:
        for band, lines in tuple(self._bands.items()):
            self._bands[band] = {tenant: line for tenant, line in lines.items() if line}
            if not self._bands[band]:
                del self._bands[band]
