"""Strata: adapters lined up by rank and cut into runs, one for each node, that make all nodes' steps alike.

Where kernels pad, the run with the largest ranks pads only its own, and what a run costs is forecast from how
often each adapter is in a batch (`forecast`), so that popular and rare adapters weigh what they take. For a
given step time nodes are filled one after another; an adapter that a cut goes through is split. The least
step time for which the nodes suffice is found by bisection.

Large ranks can fill a node's memory long before its time. What time is left is then filled from the other end of
the line, where a request needs the fewest bytes: the node gives up as many of its large adapters as that takes.
Else the nodes of the small ranks would have to answer most of the requests.
"""

from dataclasses import dataclass, replace

import numpy as np

from scheduler.cluster.cost.forecast import Crowd, Floats, Forecast

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
    which they are filled, with their memory. `descends`: by rank, so that the end needs the fewest bytes."""

    crowd: Crowd
    nbytes: Floats
    levels: tuple[int, ...]
    paces: Floats
    memory_bytes: Floats
    descends: bool = False

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
class _Rest:
    """The adapters from `index` to before `stop`, of the first only what is `left` of it."""

    index: int
    left: float
    stop: int


@dataclass(frozen=True, slots=True)
class _Run:
    """What one node takes: `whole` adapters from `index` on, of the first only what is `left` of it, then `part` of
    the next one's rest, and the last `tail` adapters of the line that ends before `stop`."""

    index: int
    left: float
    stop: int
    whole: int
    part: float = 0.0
    tail: int = 0

    @property
    def rest(self) -> "_Rest":
        """What is left of the line for the nodes that follow."""
        if not self.whole:
            return _Rest(self.index, self.left * (1 - self.part), self.stop - self.tail)
        return _Rest(self.index + self.whole, 1 - self.part, self.stop - self.tail)

    def pieces(self, node: int) -> list[Piece]:
        """As pieces of that stratum."""
        found = [Piece(self.index + at, node, self.left if at == 0 else 1.0) for at in range(self.whole)]
        if self.part:
            rest = 1.0 if self.whole else self.left
            found.append(Piece(self.index + self.whole, node, rest * self.part))
        found += [Piece(self.stop - at, node, 1.0) for at in range(1, self.tail + 1)]
        return found


def _filled(line: Line, forecast: Forecast, step_s: float) -> list[_Run] | None:
    """Runs with which no node's step exceeds `step_s`, None if the nodes do not suffice."""
    count = len(line.crowd.rates)
    runs: list[_Run] = []
    rest, least_width = _Rest(0, 1.0, count), 2 * count // len(line.paces) + 8
    for node in range(len(line.paces)):
        width = least_width
        run = _run(line, forecast, rest, (step_s, node), width)
        while max(run.whole, run.tail) == width:
            width *= 4
            run = _run(line, forecast, rest, (step_s, node), width)
        runs.append(run)
        rest = run.rest
        if rest.index >= rest.stop:
            return runs
    return None


def _run(line: Line, forecast: Forecast, rest: _Rest, limit: tuple[float, int], width: int) -> _Run:
    """What a node takes of the next `width` adapters of `rest` within `limit` (step seconds, and the node for its
    pace and memory)."""
    index, left, stop, (step_s, node) = rest.index, rest.left, rest.stop, limit
    pace, reach = float(line.paces[node]), slice(rest.index, min(rest.index + width, rest.stop))
    nbytes = np.cumsum(line.nbytes[reach])
    full = nbytes > line.memory_bytes[node]
    rates = line.crowd.rates[reach].copy()
    rates[0] *= left
    ranks = line.crowd.ranks[reach]
    sums = np.cumsum(forecast.features(Crowd(rates, ranks), step_s, line.levels), axis=1)
    over = full | (forecast.steps(sums, line.levels, pace) > step_s)
    if not over[-1]:
        return _Run(index, left, stop, len(rates))
    whole = int(np.argmax(over))
    if full[whole]:
        front = _Front(sums[:, :whole], nbytes[:whole], width)
        return (
            _topped_up(line, forecast, rest, limit, front)
            if line.descends
            else _Run(index, left, stop, whole)
        )
    before = sums[:, whole - 1] if whole else np.zeros(len(sums))
    parts = Crowd(rates[whole] * _PARTS, np.full(len(_PARTS), ranks[whole]))
    steps = forecast.steps(before[:, None] + forecast.features(parts, step_s, line.levels), line.levels, pace)
    part = float(np.interp(step_s, steps, _PARTS))
    if steps[-1] - steps[0] <= _GRAIN * step_s:
        part = round(part)
    if part > 1 - _CRUMB:
        return _Run(index, left, stop, whole + 1)
    return _Run(index, left, stop, whole, part if part > _CRUMB else 0.0)


@dataclass(frozen=True, slots=True)
class _Front:
    """Features [features, adapters] and bytes of the first adapters of a rest, summed up to each, of the `width`
    that were looked at."""

    sums: Floats
    nbytes: Floats
    width: int


def _topped_up(line: Line, forecast: Forecast, rest: _Rest, limit: tuple[float, int], front: _Front) -> _Run:
    """As many of `front`, which memory limits, as leave bytes for enough of the line's end to fill the time."""
    step_s, node = limit
    pace, whole = float(line.paces[node]), len(front.nbytes)
    end = slice(max(rest.index + whole, rest.stop - front.width), rest.stop)
    crowd = Crowd(line.crowd.rates[end][::-1], line.crowd.ranks[end][::-1])
    sums = np.cumsum(forecast.features(crowd, step_s, line.levels), axis=1)
    sums = np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)
    nbytes = np.cumsum(line.nbytes[end][::-1])
    ahead = np.concatenate([np.zeros((len(sums), 1)), front.sums], axis=1)
    free_bytes = line.memory_bytes[node] - np.concatenate([[0.0], front.nbytes])
    tails = np.searchsorted(nbytes, free_bytes, side="right")
    busy = np.flatnonzero(forecast.steps(ahead + sums[:, tails], line.levels, pace) >= step_s)
    if not len(busy):
        return _Run(rest.index, rest.left, rest.stop, whole)
    kept = int(busy[-1])
    steps = forecast.steps(ahead[:, [kept]] + sums[:, : tails[kept] + 1], line.levels, pace)
    tail = int(np.searchsorted(steps, step_s, side="right")) - 1
    return _Run(rest.index, rest.left, rest.stop, kept, 0.0, max(0, tail))
