"""Count the requests that are under way by each name, note when one was last asked for, and hold names.

Names that nobody has asked for lately are forgotten. Used on one event loop.
"""

import math
import time
from collections import Counter, OrderedDict

from engine.errors import AdapterBusy, AdapterHeld
from engine.live.held_names import HeldNames
from engine.metrics.series import MetricSeries
from scheduler.request import InvalidParameter

_MOST_NAMES = 1 << 16


class AdapterUses:
    """Requests under way, and times in seconds since 1970."""

    def __init__(self) -> None:
        self._in_flight = Counter[str]()
        self._last_s: OrderedDict[str, float] = OrderedDict()  # the longest unused first
        self.held = HeldNames()

    def check(self, name: str, count: int, most: int) -> None:
        """Raise AdapterBusy where `count` more requests would be over `most`, InvalidParameter where they alone are.

        0 means any number. Raises AdapterHeld for a name that is held: to wait would take up the queue that all share.
        """
        if (held_s := self.held.left_s(name)) is not None:
            raise AdapterHeld(name, max(1, math.ceil(held_s)))
        if most and count > most:
            remedy = f"at most {most} requests may be under way for {name!r}: send fewer prompts at once"
            raise InvalidParameter("prompt", count, remedy)
        if most and self._in_flight[name] + count > most:
            raise AdapterBusy(name, most)

    def series(self) -> MetricSeries:
        """Tell how many names are held."""
        held = sum(left_s > 0 for left_s in self.held.told().values())
        told = "Names of adapters that take no requests at this server."
        return MetricSeries("loraserve_adapters_held", told, (), [((), float(held))])

    def began(self, name: str) -> None:
        """Count a request that was accepted."""
        self._in_flight[name] += 1
        self._last_s[name] = time.time()
        self._last_s.move_to_end(name)
        if len(self._last_s) > _MOST_NAMES:
            self._last_s.popitem(last=False)

    def ended(self, name: str) -> None:
        """Count a request that has ended."""
        self._in_flight[name] -= 1
        if not self._in_flight[name]:
            del self._in_flight[name]

    def in_flight(self, name: str) -> int:
        """Return how many requests are under way."""
        return self._in_flight.get(name, 0)

    def names_in_flight(self) -> tuple[str, ...]:
        """List the names under which requests are under way."""
        return tuple(self._in_flight)

    def last_use_s(self, name: str) -> float | None:
        """Return when a request was last accepted, if that is remembered."""
        return self._last_s.get(name)
