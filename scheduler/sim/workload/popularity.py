"""Which adapter a request asks for: popularity as it changes over a run, and calls given adapters by it.

A law says, at any part of a run, how the traffic divides among the adapters; laws of change wrap another law.
It knows adapters by their ranks and order only. Chance is an argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora.adapter import AdapterRef
from scheduler.sim.workload.adapters import RankMix
from scheduler.sim.workload.trace import Arrival, Call

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SLICES = 240  # of a run, over each of which a law is taken not to change
_MOST_EXPONENT = 5  # beyond it all but the first few adapters are asked for never
_GOLDEN = 0.618033988749895  # multiples of it, modulo 1, lie as evenly as can be


class InvalidLaw(ValueError):
    """A law of popularity that cannot be read; the message gives those that can."""


class Popularity(Protocol):
    """How traffic divides among adapters."""

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Return [adapters] parts, none negative, summing to 1, at the part `at`, in [0, 1), of the run.

        `ranks` is [adapters].
        """
        ...


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """S-LoRA's: index = floor(count · U^(1/alpha)), so P(index < k) = (k / count)^alpha.

    An alpha of 1 is uniform, smaller ones are more skewed. With 0.3 the first of 100 adapters has a quarter of all
    traffic, the first ten have half of it.
    """

    alpha: float

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Look at the indices alone."""
        return np.diff((np.arange(len(ranks) + 1) / len(ranks)) ** self.alpha)


@dataclass(frozen=True, slots=True)
class ZipfLaw:
    """Each adapter's traffic is in proportion to place^-exponent, the first being the most popular.

    Of 100 adapters the first has 12 % of all traffic with an exponent of 0.8, and 28 % with 1.2.
    """

    exponent: float

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Look at the places alone."""
        weights = np.arange(1, len(ranks) + 1, dtype=np.float64) ** -self.exponent
        return weights / weights.sum()


@dataclass(frozen=True, slots=True)
class Known:
    """Shares as they were counted."""

    shares: tuple[float, ...]

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Return always the same."""
        return np.array(self.shares)


@dataclass(frozen=True, slots=True)
class Shifting:
    """The hot rank moves from the lowest to the highest over the run. `hot` of the traffic goes to it, to two
    neighbours in proportion while it passes from one to the next; the rest to all adapters by `law`."""

    law: Popularity
    hot: float = 0.7

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Divide within a rank by `law`."""
        base = self.law.weights(ranks, at)
        levels = np.unique(ranks)
        position = at * (len(levels) - 1)
        weights = (1 - self.hot) * base
        for level, rank in enumerate(levels.tolist()):
            mine = np.where(ranks == rank, base, 0.0)
            weights += self.hot * max(0.0, 1 - abs(position - level)) * mine / max(float(mine.sum()), 1e-300)
        return weights / weights.sum()


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Tenants of all time zones: each adapter's traffic swings by `swing` around that of `law`, once in the run,
    each with its own phase."""

    law: Popularity
    swing: float = 0.9

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Scale to sum to 1: who asks changes, not how much is asked."""
        phases = np.arange(len(ranks)) * _GOLDEN
        weights = self.law.weights(ranks, at) * (1 + self.swing * np.sin(2 * np.pi * (at + phases)))
        return weights / weights.sum()


@dataclass(frozen=True, slots=True)
class FlashCrowd:
    """Within `window`, in parts of the run, `part` of the traffic asks for the adapter at `index`, counted from
    the end where negative; all else by `law`."""

    law: Popularity
    index: int = -1
    window: tuple[float, float] = (0.4, 0.7)
    part: float = 0.4

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Return those of `law` outside the window."""
        weights = self.law.weights(ranks, at)
        if not self.window[0] <= at < self.window[1]:
            return weights
        burst = np.zeros(len(ranks))
        burst[self.index] = self.part
        return (1 - self.part) * weights + burst


def chosen(law: Popularity, ranks: Ints, at: Floats, rng: np.random.Generator) -> Ints:
    """Draw an adapter's index for each of the calls that come at the parts `at` [calls] of the run.

    The law does not change within each of 240 slices of it.
    """
    slices = np.clip((at * _SLICES).astype(np.int64), 0, _SLICES - 1)
    odds = rng.random(len(at))
    indices = np.zeros(len(at), dtype=np.int64)
    for number in np.unique(slices).tolist():
        mine = slices == number
        bounds = np.cumsum(law.weights(ranks, number / _SLICES))
        indices[mine] = np.searchsorted(bounds, odds[mine] * bounds[-1], side="right")
    return np.minimum(indices, len(ranks) - 1)


def assigned(
    calls: Sequence[Call], adapters: Sequence[AdapterRef], law: Popularity, rng: np.random.Generator
) -> tuple[Arrival, ...]:
    """Give each call an adapter drawn by `law`; the run lasts from 0 s to the last call."""
    times = np.array([call.arrival_s for call in calls])
    ranks = np.array([ref.rank for ref in adapters])
    indices: list[int] = chosen(law, ranks, times / max(float(times.max(initial=0.0)), 1e-9), rng).tolist()
    return tuple(
        Arrival(f"r{at}", call, adapters[index])
        for at, (call, index) in enumerate(zip(calls, indices, strict=True))
    )


def over(law: Popularity, mix: RankMix) -> Popularity:
    """Return `law`, with the hot rank moving where the mix of ranks says so."""
    return Shifting(law) if mix.shifts else law


def popularity(text: str) -> Popularity:
    """Read a law: `uniform`, `zipf`, `power`, `diurnal` or `flash`.

    The latter three may have the power law's alpha after a colon (0.3 unless given), `zipf` its exponent (1).
    """
    name, _, given = text.partition(":")
    try:
        alpha = float(given) if given else {"zipf": 1.0}.get(name, 0.3)
    except ValueError as error:
        raise InvalidLaw(
            f"popularity={text!r}: {given!r} is not a number: give {name}:ALPHA, ALPHA in (0, 1]"
        ) from error
    laws: dict[str, Popularity] = {
        "uniform": PowerLaw(1.0),
        "zipf": ZipfLaw(alpha),
        "power": PowerLaw(alpha),
        "diurnal": Diurnal(PowerLaw(alpha)),
        "flash": FlashCrowd(PowerLaw(alpha)),
    }
    most = _MOST_EXPONENT if name == "zipf" else 1
    if name not in laws or not 0 < alpha <= most or (given and name == "uniform"):
        raise InvalidLaw(
            f"popularity={text!r}: give uniform, zipf[:EXPONENT], power[:ALPHA], diurnal[:ALPHA] or flash[:ALPHA], "
            f"EXPONENT in (0, {_MOST_EXPONENT}], ALPHA in (0, 1]"
        )
    return laws[name]
