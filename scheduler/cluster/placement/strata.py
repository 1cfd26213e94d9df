"""Strata: adapters lined up by rank and cut into runs, one for each node, that make all nodes' steps alike.

Where kernels pad, the run with the largest ranks pads only its own, and what a run costs is forecast from how
often each adapter is in a batch (`forecast`), so that popular and rare adapters weigh what they take. For a
given step time nodes are filled one after another; an adapter that a cut goes through is split. The least
step time for which the nodes suffice is found by bisection.
"""

from dataclasses import dataclass, replace

import numpy as np

from scheduler.cluster.forecast import Crowd, Floats, Forecast

_CLOSE = 1.005  # bounds nearer than this, as a ratio, are one
_LEAST = 1e-4  # of an idle step: more even than this nodes need not be
_GRAIN = 0.02  # of a step: less is too little to split an adapter for
_CRUMB = 0.02  # of an adapter: less is too little to be worth a copy
_ENDLESS_S = 1e6
_PARTS = np.linspace(0.0, 1.0, 33)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of the adapter at `index` of the line that goes to stratum `node`."""

    index: int
    node: int
    part: float


@dataclass(frozen=True, slots=True)
class Line:
    """Adapters in the order in which they are cut, with their bytes, and the paces of the nodes in the order in
    which they are filled, with their memory."""

    crowd: Crowd
    nbytes: Floats
    levels: tuple[int, ...]
    paces: Floats
    memory_bytes: Floats

    def without_memory_limits(self) -> "Line":
        """Nodes that hold whatever they are given."""
        return replace(self, memory_bytes=np.full(len(self.paces), np.inf))


def cut(line: Line, forecast: Forecast) -> tuple[list[Piece], float] | None:
    """The pieces, and the seconds of the slowest node's step, within half a percent (beyond an idle node's) of
    the least; None if the nodes' memory does not suffice."""
    if line.nbytes.sum() > line.memory_bytes.sum():
        return None
    idle_s = forecast.model.base_s
    low, high = 0.0, idle_s
    while (best := _filled(line, forecast, idle_s + high)) is None:
        low, high = high, high * 4
        if high > _ENDLESS_S:
            return None
    low = low or high * _LEAST
    while high > low * _CLOSE:
        middle = float(np.sqrt(low * high))
        found = _filled(line, forecast, idle_s + middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return [piece for node, run in enumerate(best) for piece in run.pieces(node)], idle_s + high


@dataclass(frozen=True, slots=True)
class _Run:
    """What one node takes: `whole` adapters from `index` on, of the first only what is `left` of it, and then
    `part` of the next one's rest."""

    index: int
    left: float
    whole: int
    part: float

    @property
    def end(self) -> tuple[int, float]:
        """Where the next run starts."""
        if not self.whole:
            return self.index, self.left * (1 - self.part)
        return self.index + self.whole, 1 - self.part

    def pieces(self, node: int) -> list[Piece]:
        """As pieces of that stratum."""
        found = [Piece(self.index + at, node, self.left if at == 0 else 1.0) for at in range(self.whole)]
        if self.part:
            rest = 1.0 if self.whole else self.left
            found.append(Piece(self.index + self.whole, node, rest * self.part))
        return found


def _filled(line: Line, forecast: Forecast, step_s: float) -> list[_Run] | None:
    """Runs with which no node's step exceeds `step_s`, None if the nodes do not suffice."""
    count = len(line.crowd.rates)
    runs: list[_Run] = []
    start, least_width = (0, 1.0), 2 * count // len(line.paces) + 8
    for node in range(len(line.paces)):
        width = least_width
        run = _run(line, forecast, start, (step_s, node), width)
        while run.whole == width:
            width *= 4
            run = _run(line, forecast, start, (step_s, node), width)
        runs.append(run)
        start = run.end
        if start[0] == count:
            return runs
    return None


def _run(
    line: Line, forecast: Forecast, start: tuple[int, float], limit: tuple[float, int], width: int
) -> _Run:
    """What a node takes of the next `width` adapters from `start` (index, and what is left of it) within `limit`
    (step seconds, and the node for its pace and memory)."""
    (index, left), (step_s, node) = start, limit
    pace = float(line.paces[node])
    full = np.cumsum(line.nbytes[index : index + width]) > line.memory_bytes[node]
    rates = line.crowd.rates[index : index + width].copy()
    rates[0] *= left
    ranks = line.crowd.ranks[index : index + width]
    sums = np.cumsum(forecast.features(Crowd(rates, ranks), step_s, line.levels), axis=1)
    over = full | (forecast.steps(sums, line.levels, pace) > step_s)
    if not over[-1]:
        return _Run(index, left, len(rates), 0.0)
    whole = int(np.argmax(over))
    if full[whole]:
        return _Run(index, left, whole, 0.0)
    before = sums[:, whole - 1] if whole else np.zeros(len(sums))
    parts = Crowd(rates[whole] * _PARTS, np.full(len(_PARTS), ranks[whole]))
    steps = forecast.steps(before[:, None] + forecast.features(parts, step_s, line.levels), line.levels, pace)
    part = float(np.interp(step_s, steps, _PARTS))
    if steps[-1] - steps[0] <= _GRAIN * step_s:
        part = round(part)
    if part > 1 - _CRUMB:
        return _Run(index, left, whole + 1, 0.0)
    return _Run(index, left, whole, part if part > _CRUMB else 0.0)
