"""Strata: adapters lined up by rank and cut into runs, one for each node, that make all nodes' steps alike.

Where kernels pad, the run with the largest ranks pads only its own, and what a run costs is forecast from how
often each adapter is in a batch (`forecast`), so that popular and rare adapters weigh what they take. For a
given step time nodes are filled one after another; an adapter that a cut goes through is split. The least
step time for which the nodes suffice is found by bisection.
"""

from dataclasses import dataclass

import numpy as np

from scheduler.cluster.forecast import Crowd, Floats, Forecast

_BISECTIONS = 14
_GRAIN = 0.02  # of a step: less is too little to split an adapter for
_CRUMB = 0.02  # of an adapter: less is too little to be worth a copy
_PARTS = np.linspace(0.0, 1.0, 33)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of the adapter at `index` of the line that goes to stratum `node`."""

    index: int
    node: int
    part: float


@dataclass(frozen=True, slots=True)
class Line:
    """Adapters in the order in which they are cut, and the paces of the nodes in the order in which they are
    filled."""

    crowd: Crowd
    levels: tuple[int, ...]
    paces: Floats


def cut(line: Line, forecast: Forecast) -> tuple[list[Piece], float]:
    """The pieces, and the seconds of the slowest node's step. The last stratum takes what is left over when
    nodes could not take it all at any pace."""
    idle_s = forecast.model.base_s
    low, high = 1e-7, idle_s
    best = _filled(line, forecast, idle_s + high)
    while best is None and high < 1e3:
        low, high = high, high * 4
        best = _filled(line, forecast, idle_s + high)
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        found = _filled(line, forecast, idle_s + middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    assert best is not None, "steps are forecast to be finite, whatever comes"
    return best, idle_s + high


def _filled(line: Line, forecast: Forecast, step_s: float) -> list[Piece] | None:
    """Pieces with which no node's step exceeds `step_s`, None if the nodes do not suffice."""
    count, nodes = len(line.crowd.rates), len(line.paces)
    pieces: list[Piece] = []
    index, left = 0, 1.0
    for node, pace in enumerate(line.paces.tolist()):
        width = 2 * count // nodes + 8
        run = _run(line, forecast, (index, left), (step_s, pace), width)
        while run.whole == run.width and index + run.width < count:
            width *= 4
            run = _run(line, forecast, (index, left), (step_s, pace), width)
        pieces += [Piece(index + at, node, left if at == 0 else 1.0) for at in range(run.whole)]
        index, left = (index + run.whole, 1.0) if run.whole else (index, left)
        if index == count:
            return pieces
        if run.part:
            pieces.append(Piece(index, node, left * run.part))
            left *= 1 - run.part
    return None


@dataclass(frozen=True, slots=True)
class _Run:
    """Of the `width` adapters looked at, how many fit whole, and what part of the next one does."""

    width: int
    whole: int
    part: float


def _run(
    line: Line, forecast: Forecast, start: tuple[int, float], limit: tuple[float, float], width: int
) -> _Run:
    """What a node takes of the line from `start` (index, and what is left of that adapter) within `limit` (step
    seconds, and the node's pace)."""
    (index, left), (step_s, pace) = start, limit
    rates = line.crowd.rates[index : index + width].copy()
    rates[0] *= left
    ranks = line.crowd.ranks[index : index + width]
    features = forecast.features(Crowd(rates, ranks), step_s, line.levels)
    sums = np.cumsum(features, axis=1)
    over = forecast.steps(sums, line.levels, pace) > step_s
    whole = int(np.argmax(over)) if over.any() else len(rates)
    if whole == len(rates):
        return _Run(len(rates), whole, 0.0)
    before = sums[:, whole - 1] if whole else np.zeros(len(sums))
    parts = Crowd(rates[whole] * _PARTS, np.full(len(_PARTS), ranks[whole]))
    steps = forecast.steps(before[:, None] + forecast.features(parts, step_s, line.levels), line.levels, pace)
    part = float(np.interp(step_s, steps, _PARTS))
    if steps[-1] - steps[0] <= _GRAIN * step_s:
        part = round(part)
    if part == 1.0:
        return _Run(len(rates), whole + 1, 0.0)
    return _Run(len(rates), whole, part if _CRUMB < part < 1 - _CRUMB else 0.0)
