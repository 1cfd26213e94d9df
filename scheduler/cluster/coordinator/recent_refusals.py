"""Tell whether requests are refused again and again, not once by chance: what no forecast of nodes' steps can know.

A forecast knows neither how many seats nodes have nor how much K/V memory is in use. Whoever is refused tells.
"""

from collections import deque
from dataclasses import dataclass

_MOST_REFUSED = 0.01  # of the tokens asked for: fewer refusals are the price of chance

_SAMPLES = 20  # in the time that is asked for


@dataclass(frozen=True, slots=True)
class _TokenTotals:
    """Tokens since the beginning, at one time."""

    at_s: float
    asked: int
    refused: int


class RecentRefusals:
    """Keeps totals of the time that was last asked for, however seldom that is. What is refused was asked for too."""

    def __init__(self) -> None:
        self._asked = self._refused = 0
        self._kept: deque[_TokenTotals] = deque(maxlen=4 * _SAMPLES)
        self._apart_s = 0.5

    def count(self, tokens: int, refused: bool, now: float) -> None:
        """Count tokens that nodes took in, or that were refused."""
        self._asked += tokens
        self._refused += tokens if refused else 0
        kept = self._kept
        at_s = now
        if len(kept) > 1 and now - kept[-2].at_s < self._apart_s:
            at_s = kept.pop().at_s
        kept.append(_TokenTotals(at_s, self._asked, self._refused))

    def clear(self) -> None:
        """Begin anew: what was refused before says nothing of what there is now."""
        self._kept.clear()

    def persist(self, window_s: float, now: float) -> float | None:
        """Return the tokens/s asked for in the last `window_s` if too much of each half was refused, else None."""
        self._apart_s = window_s / _SAMPLES
        begin, middle = self._by(now - window_s), self._by(now - window_s / 2)
        if begin is None or middle is None:
            return None
        end = self._kept[-1]
        if not (_is_much(begin, middle) and _is_much(middle, end)):
            return None
        return (end.asked - begin.asked) / (now - begin.at_s)

    def _by(self, at_s: float) -> _TokenTotals | None:
        """Return the last totals until then; None if there are none so old."""
        return next((each for each in reversed(self._kept) if each.at_s <= at_s), None)


def _is_much(before: _TokenTotals, after: _TokenTotals) -> bool:
    refused = after.refused - before.refused
    return refused > _MOST_REFUSED * (after.asked - before.asked)
