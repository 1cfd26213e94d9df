"""Demand: what each adapter will ask for, projected from what it asked for.

Tokens are counted in windows. When a window closes its rate x updates Holt's smoothed level and slope (C. C.
Holt, 1957; the slope damped, Gardner and McKenzie, 1985):

    level ← α·x + (1 - α)·(level + δ·slope)        slope ← β·(level - level before) + (1 - β)·δ·slope

and the projection h windows ahead is level + (δ + δ² + … + δʰ)·slope, never below 0. Two corrections:
    burst   the tokens of the open window alone, spread over a whole one, are a lower bound of its rate, so a
            flash crowd shows before its window closes;
    prior   an adapter seen for w windows counts as 2^-w prior: the mean level of its rank, else of all, else
            a given rate, so a new adapter is neither free nor everything.
Knows no node: a token counts once, wherever it was taken in.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora.adapter import AdapterRef
from scheduler.cluster.state import Demand

_FORGOTTEN_WINDOWS = 64  # after so many empty windows every level is 0 to within 2^-32 of what it was


class DemandSource(Protocol):
    """What the coordinator plans for."""

    def add(self, adapter: AdapterRef) -> None:
        """Project `adapter` too, from now on."""
        ...

    def remove(self, adapter: AdapterRef) -> None:
        """Forget it."""
        ...

    def observe(self, adapter: AdapterRef, tokens: int, now: float) -> bool:
        """Learn of tokens that nodes took in; True if a plan should see that soon."""
        ...

    def project(self, now: float) -> Demand:
        """Return the rates to plan for, in order of registration."""
        ...


@dataclass(frozen=True, slots=True)
class DemandOptions:
    """`level_weight` is α, `slope_weight` β, `damping` δ; `ahead_windows` is h. An adapter `surges` when its
    open window's tokens exceed `surge_factor` times those projected for the whole of it, and
    `surge_tokens`."""

    window_s: float = 10.0
    level_weight: float = 0.5
    slope_weight: float = 0.3
    damping: float = 0.8
    ahead_windows: int = 2
    prior_tokens_per_s: float = 10.0
    surge_factor: float = 2.0
    surge_tokens: int = 10_000


class DemandTracker:
    """Counts tokens by adapter and projects their rates. Closing a window costs O(adapters), the rest
    O(1)."""

    def __init__(self, options: DemandOptions) -> None:
        self._options = options
        self._slots: dict[AdapterRef, int] = {}
        self._free: list[int] = []
        self._window = 0  # index of the open window: it began at _window * window_s
        self._level: NDArray[np.float64] = np.zeros(0)
        self._slope: NDArray[np.float64] = np.zeros(0)
        self._open: NDArray[np.float64] = np.zeros(0)
        self._age: NDArray[np.float64] = np.zeros(0)
        self._rank: NDArray[np.float64] = np.zeros(0)

    def add(self, adapter: AdapterRef) -> None:
        """Track `adapter` from now on; it has no history yet. Adding one again changes nothing."""
        if adapter in self._slots:
            return
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slots[adapter] = slot
        self._rank[slot] = adapter.rank
        self._age[slot] = -1  # the window that is open now is not seen whole, and does not count

    def remove(self, adapter: AdapterRef) -> None:
        """Forget `adapter` and its history."""
        slot = self._slots.pop(adapter)
        for column in self._columns:
            column[slot] = 0
        self._free.append(slot)

    def observe(self, adapter: AdapterRef, tokens: int, now: float) -> bool:
        """Count tokens that nodes took in for a tracked adapter; True when that makes it surge."""
        self.advance(now)
        slot = self._slots[adapter]
        options = self._options
        self._open[slot] += tokens
        foreseen = max(0.0, self._level[slot] + self._slope[slot]) * options.window_s
        return bool(self._open[slot] > max(options.surge_factor * foreseen, options.surge_tokens))

    def advance(self, now: float) -> None:
        """Close every window that ended by `now`."""
        window = int(now // self._options.window_s)
        ended = window - self._window
        for _ in range(min(ended, _FORGOTTEN_WINDOWS)):
            self._close()
        if ended > _FORGOTTEN_WINDOWS:
            self._level[:] = self._slope[:] = 0
        self._window = max(window, self._window)

    def project(self, now: float) -> Demand:
        """Return the rates to plan for, in order of registration."""
        self.advance(now)
        options = self._options
        reach = sum(options.damping**step for step in range(1, options.ahead_windows + 1))
        trend = np.maximum(0.0, self._level + reach * self._slope)
        burst = self._open / options.window_s
        doubt = np.exp2(-np.maximum(0, self._age))
        rates = np.maximum(burst, doubt * self._prior() + (1 - doubt) * trend)
        slots = list(self._slots.values())
        return Demand(MappingProxyType(dict(zip(self._slots, rates[slots].tolist(), strict=True))))

    @property
    def _columns(self) -> tuple[NDArray[np.float64], ...]:
        return self._level, self._slope, self._open, self._age, self._rank

    def _grow(self) -> None:
        size = len(self._level)
        more = np.zeros(max(64, size))
        columns = (np.concatenate([column, more]) for column in self._columns)
        self._level, self._slope, self._open, self._age, self._rank = columns
        self._free = list(range(size + len(more) - 1, size - 1, -1))

    def _close(self) -> None:
        options = self._options
        rate = self._open / options.window_s
        ahead = self._level + options.damping * self._slope
        level = options.level_weight * rate + (1 - options.level_weight) * ahead
        slope = options.slope_weight * (level - self._level) + (1 - options.slope_weight) * (
            ahead - self._level
        )
        seen = self._age > 0
        self._slope = np.where(seen, slope, 0.0)
        self._level = np.maximum(0.0, np.where(seen, level, np.where(self._age == 0, rate, 0.0)))
        self._open = np.zeros_like(self._open)
        self._age = np.minimum(self._age + (self._rank > 0), _FORGOTTEN_WINDOWS)

    def _prior(self) -> NDArray[np.float64]:
        """Return, for each slot, the mean level of its rank's adapters that have a history, else of all that
        have one."""
        seen = self._age > 0
        overall = float(self._level[seen].mean()) if seen.any() else self._options.prior_tokens_per_s
        prior = np.full(len(self._level), overall)
        for rank in np.unique(self._rank[seen]):
            same = self._rank == rank
            prior[same] = self._level[same & seen].mean()
        return prior
