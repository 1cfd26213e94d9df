"""Partition adapters, ordered by rank, into runs, one for each node, that make all nodes' steps alike.

Where kernels pad, the run with the largest ranks pads only its own. What a run costs is forecast from how
often each adapter is in a batch (`forecast`), so popular and rare adapters weigh what they take. For a given
step time nodes are filled one after another; an adapter at the end of a run may be split between two. The
least step time for which the nodes suffice is found by bisection.

Large ranks can fill a node's memory long before its time. What time is left is then filled from the other end of
the order, where a request needs the fewest bytes: the node gives up as many of its large adapters as that takes.
Else the nodes of the small ranks would have to answer most of the requests.
"""

from dataclasses import dataclass, replace

import numpy as np

from scheduler.cluster.cost.forecast import AdapterRates, Floats, Forecast

_CLOSE = 1.005  # bounds nearer than this, as a ratio, are one
_LEAST = 1e-4  # of an idle step: more even than this nodes need not be
_GRAIN = 0.02  # of a step: less is too little to split an adapter for
_CRUMB = 0.02  # of an adapter: less is too little to be worth a copy
_ENDLESS_S = 1e6
_PARTS = np.linspace(0.0, 1.0, 33)


@dataclass(frozen=True, slots=True)
class PartitionProblem:
    """Adapters with their bytes in order, and the nodes in the order in which they are filled.

    `levels` are the ranks there are. `slowdowns` and `memory_bytes` are the nodes'. `descends`: by rank, so
    that the last adapters need the fewest bytes.
    """

    adapters: AdapterRates
    nbytes: Floats
    levels: tuple[int, ...]
    slowdowns: Floats
    memory_bytes: Floats
    descends: bool = False

    def without_memory_limits(self) -> "PartitionProblem":
        """Return the same for nodes that hold whatever they are given."""
        return replace(self, memory_bytes=np.full(len(self.slowdowns), np.inf))


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of the adapter at `index` that goes to the run of the node at `node`."""

    index: int
    node: int
    part: float


@dataclass(frozen=True, slots=True)
class Partition:
    """All pieces, and the seconds that the slowest node's step may then take."""

    pieces: list[Piece]
    slowest_s: float


def partition(problem: PartitionProblem, forecast: Forecast) -> Partition | None:
    """Find runs whose slowest step is within half a percent (beyond an idle node's) of the least.

    Returns None if the nodes' memory does not suffice.
    """
    if problem.nbytes.sum() > problem.memory_bytes.sum():
        return None
    idle_s = forecast.model.base_s
    low, high = 0.0, idle_s
    while (best := _Filling(problem, forecast, idle_s + high).runs()) is None:
        low, high = high, high * 4
        if high > _ENDLESS_S:
            return None
    low = low or high * _LEAST
    while high > low * _CLOSE:
        middle = float(np.sqrt(low * high))
        found = _Filling(problem, forecast, idle_s + middle).runs()
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return Partition([piece for node, run in enumerate(best) for piece in run.pieces(node)], idle_s + high)


@dataclass(frozen=True, slots=True)
class NodeBudget:
    """What one node may take: steps of `step_s`, which last `slowdown` times as long there, and its memory."""

    step_s: float
    slowdown: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class _Remaining:
    """The adapters from `start` to before `end`, of the first only `first_part`."""

    start: int
    first_part: float
    end: int


@dataclass(frozen=True, slots=True)
class _NodeRun:
    """What one node takes of `before`: the first `whole` adapters, `part` of the next, and the last `tail`."""

    before: _Remaining
    whole: int
    part: float = 0.0
    tail: int = 0

    @property
    def after(self) -> _Remaining:
        """Return what is left for the nodes that follow."""
        start, end = self.before.start + self.whole, self.before.end - self.tail
        return _Remaining(start, self._next_part * (1 - self.part), end)

    def pieces(self, node: int) -> list[Piece]:
        """Return the run as pieces of that node."""
        start, first_part = self.before.start, self.before.first_part
        found = [Piece(start + at, node, first_part if at == 0 else 1.0) for at in range(self.whole)]
        if self.part:
            found.append(Piece(start + self.whole, node, self._next_part * self.part))
        found += [Piece(self.before.end - at, node, 1.0) for at in range(1, self.tail + 1)]
        return found

    @property
    def _next_part(self) -> float:
        """Return how much there was of the adapter after the whole ones."""
        return 1.0 if self.whole else self.before.first_part


@dataclass(frozen=True, slots=True)
class _Window:
    """Adapters that are looked at, and the sums up to each of them.

    `sums` [features, adapters] are of features, `nbytes` [adapters] of bytes.
    """

    adapters: AdapterRates
    sums: Floats
    nbytes: Floats


class _Filling:
    """Nodes filled one after another, so that none's step exceeds `step_s`."""

    def __init__(self, problem: PartitionProblem, forecast: Forecast, step_s: float) -> None:
        self._problem, self._forecast, self._step_s = problem, forecast, step_s

    def runs(self) -> list[_NodeRun] | None:
        """Return each node's run as far as nodes are needed, None if they do not suffice."""
        problem, runs = self._problem, list[_NodeRun]()
        remaining = _Remaining(0, 1.0, len(problem.nbytes))
        least_width = 2 * remaining.end // len(problem.slowdowns) + 8
        for slowdown, memory_bytes in zip(
            problem.slowdowns.tolist(), problem.memory_bytes.tolist(), strict=True
        ):
            budget, width = NodeBudget(self._step_s, slowdown, memory_bytes), least_width
            run = self._run(remaining, budget, width)
            while max(run.whole, run.tail) == width:
                width *= 4
                run = self._run(remaining, budget, width)
            runs.append(run)
            remaining = run.after
            if remaining.start >= remaining.end:
                return runs
        return None

    def _run(self, remaining: _Remaining, budget: NodeBudget, width: int) -> _NodeRun:
        """Choose what a node takes; no more than `width` adapters from either end are looked at."""
        window = self._first(remaining, width)
        full = window.nbytes > budget.memory_bytes
        over = full | (self._steps(window.sums, budget) > budget.step_s)
        if not over[-1]:
            return _NodeRun(remaining, len(over))
        whole = int(np.argmax(over))
        if not full[whole]:
            return self._split(remaining, budget, window, whole)
        if self._problem.descends:
            return self._with_tail(remaining, budget, window, whole)
        return _NodeRun(remaining, whole)

    def _split(self, remaining: _Remaining, budget: NodeBudget, window: _Window, whole: int) -> _NodeRun:
        """Add the part of the adapter after the whole ones that uses up the step's time."""
        before = window.sums[:, whole - 1] if whole else np.zeros(len(window.sums))
        rate, rank = window.adapters.rates[whole], window.adapters.ranks[whole]
        features = self._features(AdapterRates(rate * _PARTS, np.full(len(_PARTS), rank)))
        steps = self._steps(before[:, None] + features, budget)
        part = float(np.interp(budget.step_s, steps, _PARTS))
        if steps[-1] - steps[0] <= _GRAIN * budget.step_s:
            part = float(round(part))
        if part > 1 - _CRUMB:
            return _NodeRun(remaining, whole + 1)
        return _NodeRun(remaining, whole, part if part > _CRUMB else 0.0)

    def _with_tail(self, remaining: _Remaining, budget: NodeBudget, window: _Window, whole: int) -> _NodeRun:
        """Keep as many of the `whole` adapters as leave bytes for enough of the last ones to fill the time."""
        last = self._last(remaining, whole, len(window.nbytes))
        kept_sums, last_sums = _from_none(window.sums[:, :whole]), _from_none(last.sums)
        free_bytes = budget.memory_bytes - np.concatenate([[0.0], window.nbytes[:whole]])
        tails = np.searchsorted(last.nbytes, free_bytes, side="right")
        busy = np.flatnonzero(self._steps(kept_sums + last_sums[:, tails], budget) >= budget.step_s)
        if not len(busy):
            return _NodeRun(remaining, whole)
        kept = int(busy[-1])
        steps = self._steps(kept_sums[:, [kept]] + last_sums[:, : tails[kept] + 1], budget)
        tail = int(np.searchsorted(steps, budget.step_s, side="right")) - 1
        return _NodeRun(remaining, kept, 0.0, max(0, tail))

    def _first(self, remaining: _Remaining, width: int) -> _Window:
        """Sum up the first `width` adapters."""
        adapters = self._problem.adapters
        reach = slice(remaining.start, min(remaining.start + width, remaining.end))
        rates = adapters.rates[reach].copy()
        rates[0] *= remaining.first_part
        return self._window(AdapterRates(rates, adapters.ranks[reach]), self._problem.nbytes[reach])

    def _last(self, remaining: _Remaining, whole: int, width: int) -> _Window:
        """Sum up the last `width` adapters after the `whole` ones, the very last first."""
        adapters = self._problem.adapters
        reach = slice(max(remaining.start + whole, remaining.end - width), remaining.end)
        reverse = AdapterRates(adapters.rates[reach][::-1], adapters.ranks[reach][::-1])
        return self._window(reverse, self._problem.nbytes[reach][::-1])

    def _window(self, adapters: AdapterRates, nbytes: Floats) -> _Window:
        return _Window(adapters, np.cumsum(self._features(adapters), axis=1), np.cumsum(nbytes))

    def _features(self, adapters: AdapterRates) -> Floats:
        return self._forecast.features(adapters, self._step_s, self._problem.levels)

    def _steps(self, sums: Floats, budget: NodeBudget) -> Floats:
        return self._forecast.steps(sums, self._problem.levels, budget.slowdown)


def _from_none(sums: Floats) -> Floats:
    """Put the sums of no adapter before those up to each."""
    return np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)
