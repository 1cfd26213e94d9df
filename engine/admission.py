"""Bound how many sequences wait to run. Knows neither adapters nor steps."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from engine.errors import Overloaded, TooManySequences

_RETRY_AFTER_S = 1


class Admission:
    """Gives out the places of a queue whose length `waiting` tells.

    A request has its places, one for each of its sequences, from when it is admitted on: before it is queued,
    while its adapter is still looked for, it holds them here. Used on the event loop only.
    """

    def __init__(self, limit: int, waiting: Callable[[], int]) -> None:
        """Admit up to `limit` sequences at once; those that wait count."""
        self._limit = limit
        self._waiting = waiting
        self._held = 0

    @contextmanager
    def places(self, count: int) -> Generator[None]:
        """Hold `count` places while a request is made ready to be queued.

        Raises TooManySequences for more than there are even when nothing waits, Overloaded for more than are free.
        """
        if count > self._limit:
            raise TooManySequences(count, self._limit)
        waiting = self._waiting() + self._held
        if waiting + count > self._limit:
            raise Overloaded(waiting, self._limit, _RETRY_AFTER_S)
        self._held += count
        try:
            yield
        finally:
            self._held -= count
