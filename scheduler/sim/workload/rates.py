"""When calls come: how their rate changes over a run, and how bursty they are about it.

A process goes on at the run's rate in a time of its own. The curve says how fast that time passes in the run's.
So every process can be had under every curve. Chance is an argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.sim.workload.trace import Call, paced

Floats = NDArray[np.float64]

_CV = 2.0  # of a gamma process's gaps unless given; a Poisson process has 1
_FLASH_TIMES, _FLASH_AT, _FLASH_HALF = 4.0, 0.4, 0.05  # the latter two in parts of the run
_PIECES = 240  # that a curve is made of where it is smooth


class InvalidArrivals(ValueError):
    """A curve or a process that cannot be read; the message gives those that can."""


@dataclass(frozen=True, slots=True)
class RateCurve:
    """From each of `starts_s` on, ascending from 0, the rate is so many times the run's; none is 0."""

    starts_s: tuple[float, ...] = (0.0,)
    factors: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        ascends = all(a < b for a, b in zip(self.starts_s, self.starts_s[1:], strict=False))
        if len(self.starts_s) != len(self.factors) or self.starts_s[:1] != (0.0,) or not ascends:
            raise InvalidArrivals(f"starts_s={self.starts_s}: give them ascending from 0, each with a factor")
        if min(self.factors) <= 0:
            raise InvalidArrivals(f"factors={self.factors}: give factors above 0")

    def mean(self, seconds: float) -> float:
        """Return the mean factor over the first `seconds`."""
        return self._passed(seconds) / seconds

    def times(self, own_s: Floats) -> Floats:
        """Map times of a process that goes on at the run's rate to times at which the curve has it."""
        starts, factors = np.array(self.starts_s), np.array(self.factors)
        passed = np.concatenate([[0.0], np.cumsum(np.diff(starts) * factors[:-1])])
        piece = np.searchsorted(passed, own_s, side="right") - 1
        return starts[piece] + (own_s - passed[piece]) / factors[piece]

    def _passed(self, until_s: float) -> float:
        """Return the integral of the factors."""
        ends = [*self.starts_s[1:], float("inf")]
        pieces = zip(self.starts_s, ends, self.factors, strict=True)
        return sum(max(0.0, min(end, until_s) - start) * factor for start, end, factor in pieces)


STEADY = RateCurve()


def steps(*steps: tuple[float, float, float], base: float = 1.0) -> RateCurve:
    """Make a curve of `base` with steps (times, from_s, for_s) on it, in order of time and apart."""
    pieces: dict[float, float] = {0.0: base}
    for times, from_s, for_s in steps:
        pieces[from_s] = times
        pieces[from_s + for_s] = base
    return RateCurve(tuple(pieces), tuple(pieces.values()))


def flash_crowd(seconds: float, times: float = _FLASH_TIMES) -> RateCurve:
    """Make a curve that leaps to `times` after 40 % of the run; what is above 1 halves every 5 % of it."""
    at = np.linspace(0.0, 1.0, _PIECES, endpoint=False)
    since = np.maximum(0.0, at - _FLASH_AT)
    factors = np.where(at < _FLASH_AT, 1.0, 1.0 + (times - 1.0) * 0.5 ** (since / _FLASH_HALF))
    return RateCurve(tuple((at * seconds).tolist()), tuple(factors.tolist()))


def day(seconds: float, swing: float = 0.5) -> RateCurve:
    """Make a curve that swings by `swing`, below 1, around 1: once in the run, from its lowest on."""
    at = np.linspace(0.0, 1.0, _PIECES, endpoint=False)
    factors = 1.0 - swing * np.cos(2 * np.pi * at)
    return RateCurve(tuple((at * seconds).tolist()), tuple(factors.tolist()))


def rate_curve(text: str, seconds: float) -> RateCurve:
    """Read a curve of a run of `seconds`.

    It is `steady`, `steady:TIMES`, `step:TIMES:FROM_S:FOR_S`, `flash` or `flash:TIMES`, `day` or `day:SWING`.
    """
    name, *given = text.split(":")
    try:
        numbers = [float(each) for each in given]
    except ValueError:
        numbers = [-1.0]
    if all(0 < each < float("inf") for each in numbers):
        match name, numbers:
            case "steady", []:
                return STEADY
            case "steady", [times]:
                return RateCurve((0.0,), (times,))
            case "step", [times, from_s, for_s]:
                return steps((times, from_s, for_s))
            case "flash", [] | [_]:
                return flash_crowd(seconds, *numbers)
            case "day", [] | [_]:
                return day(seconds, *numbers)
            case _:
                pass
    raise InvalidArrivals(
        f"curve={text!r}: give steady[:TIMES], step:TIMES:FROM_S:FOR_S, flash[:TIMES] or day[:SWING], "
        "with numbers above 0"
    )


def gamma_times(rate: float, seconds: float, cv: float, rng: np.random.Generator) -> Floats:
    """Draw times in [0, seconds) of a renewal process of `rate` a second.

    Its gaps are gamma distributed with the coefficient of variation `cv`: 1 is Poisson, more comes in bursts.
    """
    shape = cv**-2
    count = int(rate * seconds + 10 * cv * (rate * seconds) ** 0.5 + 100)
    times = np.cumsum(rng.gamma(shape, 1 / (shape * rate), count))
    return times[times < seconds]


@dataclass(frozen=True, slots=True)
class Pacing:
    """Calls at `rate` a second for `seconds`, times what the `curve` says.

    `cv` is that of a gamma process; None leaves the gaps to the trace.
    """

    rate: float
    seconds: float
    cv: float | None = None
    curve: RateCurve = STEADY

    def calls(self, trace: Sequence[Call], rng: np.random.Generator) -> tuple[Call, ...]:
        """Take successive calls of `trace`, from a drawn one on, at the times that this says."""
        first, seconds = int(rng.integers(len(trace))), self.seconds * self.curve.mean(self.seconds)
        if self.cv is None:
            chosen = paced(trace, self.rate, seconds, first)
            own_s = np.array([call.arrival_s for call in chosen])
        else:
            own_s = gamma_times(self.rate, seconds, self.cv, rng)
            chosen = tuple(trace[(first + at) % len(trace)] for at in range(len(own_s)))
        times: list[float] = np.minimum(self.curve.times(own_s), self.seconds).tolist()
        return tuple(call.at(time_s) for call, time_s in zip(chosen, times, strict=True))


def process_cv(text: str) -> float | None:
    """Read a process: `trace` (None: its own gaps), `poisson`, `gamma` or `gamma:CV`, CV being 2 unless given."""
    name, colon, given = text.partition(":")
    known: dict[str, float | None] = {"trace": None, "poisson": 1.0, "gamma": _CV}
    try:
        cv = float(given) if colon else known[name]
    except (KeyError, ValueError):
        cv = -1.0
    if (colon and name != "gamma") or (cv is not None and not 0 < cv <= 100):
        raise InvalidArrivals(f"arrivals={text!r}: give trace, poisson or gamma[:CV], CV in (0, 100]")
    return cv
