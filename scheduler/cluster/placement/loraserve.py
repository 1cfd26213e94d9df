"""The placement of LoRAServe (arXiv 2511.22880), as far as the paper lets it be reconstructed.

    budget     nodes per rank in proportion to util[r] = Σ TPS / OP[r], by largest remainder
    pack       per rank, descending: adapters by TPS descending fill the rank's nodes one after another up to
               cap = target·OP[r], target = Σ util / nodes; where the cap cuts, the adapter is split
    leftovers  by rank descending, whole, onto the least loaded node whose largest rank is at least theirs, else
               onto the least loaded of all
    permute    nodes are relabelled for the most adapters in common with the placement before

The paper takes nodes to be alike (the first one's operating points hold for all) and their memory to
suffice.
"""

from types import MappingProxyType

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.placement.assignment import best_assignment
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.state import Placement, normalised


class _Bins:
    """Alike bins, one for each node: load in units of utilisation, and who is in them with what part."""

    def __init__(self, problem: Problem) -> None:
        self.rates = problem.demand.tokens_per_s
        self.node = problem.nodes[0]
        self.load = [0.0] * len(problem.nodes)
        self.largest = [0] * len(problem.nodes)
        self.parts: dict[AdapterRef, dict[int, float]] = {ref: {} for ref in self.rates}

    def util(self, ref: AdapterRef) -> float:
        return self.rates[ref] / self.node.sustains(ref.rank)

    def put(self, ref: AdapterRef, at: int, part: float) -> None:
        self.parts[ref][at] = self.parts[ref].get(at, 0.0) + part
        self.load[at] += part * self.util(ref)
        self.largest[at] = max(self.largest[at], ref.rank)


class LoraservePlacement:
    """The paper's steps, in its order; see the module."""

    def place(self, problem: Problem) -> Placement:
        """Pack anew each time; only the relabelling looks at the placement before."""
        bins = _Bins(problem)
        by_rank: dict[int, list[AdapterRef]] = {}
        for ref in sorted(bins.rates, key=lambda ref: (-ref.rank, -bins.rates[ref])):
            by_rank.setdefault(ref.rank, []).append(ref)
        target = sum(bins.util(ref) for ref in bins.rates) / len(problem.nodes)
        leftovers: list[tuple[AdapterRef, float]] = []
        first = 0
        for rank, size in _budgets(bins, by_rank, target).items():
            leftovers += _pack(bins, by_rank[rank], range(first, first + size), target)
            first += size
        for ref, part in leftovers:
            _put_leftover(bins, ref, part)
        return _relabelled(problem, bins)


def _budgets(bins: _Bins, by_rank: dict[int, list[AdapterRef]], target: float) -> dict[int, int]:
    nodes = len(bins.load)
    exact = {rank: sum(map(bins.util, refs)) / target if target else 0.0 for rank, refs in by_rank.items()}
    budgets = {rank: int(share) for rank, share in exact.items()}
    for rank in sorted(exact, key=lambda rank: budgets[rank] - exact[rank])[: nodes - sum(budgets.values())]:
        budgets[rank] += 1
    return budgets


def _pack(bins: _Bins, refs: list[AdapterRef], group: range, target: float) -> list[tuple[AdapterRef, float]]:
    """Fill the group's bins one after another; returns what is left over, as (adapter, part)."""
    leftovers: list[tuple[AdapterRef, float]] = []
    at = group.start
    for ref in refs:
        util, left = bins.util(ref), 1.0
        if util == 0:
            if group:
                bins.put(ref, min(group, key=lambda node: bins.load[node]), 1.0)
            else:
                leftovers.append((ref, 1.0))
            continue
        while left > 1e-9 and at < group.stop:
            part = min(left, (target - bins.load[at]) / util)
            if part > 1e-9:
                bins.put(ref, at, part)
                left -= part
            if left > 1e-9:
                at += 1
        if left > 1e-9:
            leftovers.append((ref, left))
    return leftovers


def _put_leftover(bins: _Bins, ref: AdapterRef, part: float) -> None:
    nodes = range(len(bins.load))
    eligible = [at for at in nodes if bins.largest[at] >= ref.rank] or list(nodes)
    bins.put(ref, min(eligible, key=lambda at: bins.load[at]), part)


def _relabelled(problem: Problem, bins: _Bins) -> Placement:
    numbers = {state.node: at for at, state in enumerate(problem.nodes)}
    common = np.zeros((len(numbers), len(numbers)))
    for ref, parts in bins.parts.items():
        for share in problem.previous.shares.get(ref, ()):
            if share.node in numbers:
                for at in parts:
                    common[at, numbers[share.node]] += 1
    label = best_assignment(common)
    named = {
        ref: normalised((problem.nodes[label[at]].node, part) for at, part in parts.items())
        for ref, parts in bins.parts.items()
    }
    return Placement(MappingProxyType(named))
