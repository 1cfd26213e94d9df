"""Tell whether requests are refused again and again, not once by chance: what no forecast of nodes' steps can know.

A forecast knows neither how many seats nodes have nor how much K/V memory is in use. Whoever is refused tells.
"""

from collections import deque
from dataclasses import dataclass

_MOST_REFUSED = 0.01  # of the tokens asked for: fewer refusals are the price of chance


@dataclass(frozen=True, slots=True)
class _TokenTotals:
    """Tokens since the beginning, at one time."""

    at_s: float
    asked: int
    refused: int


class RecentRefusals:
    """Keeps the totals of the last `window_s`. What is refused counts as asked for too."""

    def __init__(self) -> None:
        self._asked = self._refused = 0
        self._kept: deque[_TokenTotals] = deque()

    def count(self, tokens: int, refused: bool) -> None:
        """Count tokens that nodes took in, or that were refused."""
        self._asked += tokens
        self._refused += tokens if refused else 0

    def clear(self) -> None:
        """Begin anew: what was refused before says nothing of what there is now."""
        self._kept.clear()

    def persist(self, window_s: float, now: float) -> bool:
        """Tell whether too much was refused both in the first half of the last `window_s` and in the second."""
        kept = self._kept
        kept.append(_TokenTotals(now, self._asked, self._refused))
        while len(kept) > 1 and kept[1].at_s <= now - window_s:
            kept.popleft()
        if now - kept[0].at_s < window_s:
            return False
        middle = next(each for each in kept if each.at_s >= now - window_s / 2)
        return _is_much(kept[0], middle) and _is_much(middle, kept[-1])


def _is_much(before: _TokenTotals, after: _TokenTotals) -> bool:
    refused = after.refused - before.refused
    return refused > _MOST_REFUSED * (after.asked - before.asked)
