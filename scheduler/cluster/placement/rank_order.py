"""Order adapters by rank, and nodes by the ranks they have, both so that little moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.forecast import AdapterRates, Floats, Forecast
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.partition import PartitionProblem
from scheduler.cluster.state import Demand, NodeState, Placement

_IDLE = 1e-6  # the demand of an adapter that nobody asks for, in parts of the mean: it still needs a place
_TIGHT = 0.5  # of all memory: where the adapters take more, it is tight
_BUSY = 0.5  # of the nodes' time: the least that is planned for there
_ROUNDS = 4  # how often a step's seconds and who is in it are reckoned from each other

Parts = Mapping[AdapterRef, Mapping[int, float]]
"""Adapter → the number of a node → the part of its traffic that the node takes."""


@dataclass(frozen=True, slots=True)
class RankOrder:
    """`refs` and `partition_problem.adapters` in order; `node_order[i]` is the number of the node filled i-th.

    `homes` are the nodes that have an adapter's bytes or had a share of it.
    """

    problem: Problem
    refs: tuple[AdapterRef, ...]
    rates: Mapping[AdapterRef, float]
    partition_problem: PartitionProblem
    node_order: tuple[int, ...]
    homes: Mapping[AdapterRef, tuple[int, ...]]


def rank_order(problem: Problem, forecast: Forecast) -> RankOrder:
    """Order the problem's adapters and nodes for a partition.

    Ranks descend where they disturb each other. Within a rank adapters go by their nodes, see `_SortKey`.
    """
    rates = planned_rates(problem, forecast)
    before = _parts_before(problem, rates)
    order = _node_order(len(problem.nodes), before, rates)
    descends = forecast.model.kernel.mixes
    refs = _sorted_adapters(before, order, descends)
    adapters = AdapterRates(
        np.array([rates[ref] for ref in refs]), np.array([float(ref.rank) for ref in refs])
    )
    partition_problem = PartitionProblem(
        adapters=adapters,
        nbytes=np.array([float(ref.nbytes) for ref in refs]),
        levels=tuple(sorted({ref.rank for ref in refs})),
        slowdowns=slowdowns(problem.nodes)[list(order)],
        memory_bytes=np.array([float(problem.nodes[node].memory_bytes) for node in order]),
        descends=descends,
    )
    return RankOrder(problem, refs, rates, partition_problem, order, _homes(problem, before))


def slowdowns(nodes: tuple[NodeState, ...]) -> Floats:
    """Return [nodes] how many times longer steps take than on the fastest kind of node there is."""
    known: dict[object, float] = {}
    for state in nodes:
        points = state.operating_points
        known.setdefault(points, points.at(points.ranks[0]))
    fastest = max(known.values())
    return np.array([state.slowdown * fastest / known[state.operating_points] for state in nodes])


def planned_rates(problem: Problem, forecast: Forecast) -> dict[AdapterRef, float]:
    """Return requests/s of each adapter to plan for, none 0.

    Where memory is tight moves are slow: what leaves a node can only leave when its next one has room. There
    a cluster that has little to do is taken to be as busy as it may soon be.
    """
    rates = _rates(problem.demand, forecast)
    memory_bytes = sum(state.memory_bytes for state in problem.nodes)
    if sum(ref.nbytes for ref in rates) <= _TIGHT * memory_bytes:
        return rates
    least = _BUSY * float((1 / slowdowns(problem.nodes)).sum()) / forecast.request_s
    factor = max(1.0, least / sum(rates.values()))
    return {ref: rate * factor for ref, rate in rates.items()}


def step_seconds(
    forecast: Forecast,
    problem: Problem,
    placement: Placement,
    known: Mapping[AdapterRef, float] | None = None,
) -> dict[str, float]:
    """Forecast the seconds of a step of each node under `placement`.

    The rates are those `known`, or else those of the demand.
    """
    number = {state.node: at for at, state in enumerate(problem.nodes)}
    rates = known or _rates(problem.demand, forecast)
    parts = [
        (number[share.node], share.part * rates.get(ref, 0.0), float(ref.rank))
        for ref, shares in placement.shares.items()
        for share in shares
        if share.node in number
    ]
    table = np.array(parts).reshape(-1, 3)
    at, adapters = table[:, 0].astype(np.int64), AdapterRates(table[:, 1], table[:, 2])
    levels, slower = tuple(sorted({ref.rank for ref in placement.shares})), slowdowns(problem.nodes)
    found = slower * forecast.model.base_s
    for _ in range(_ROUNDS if parts else 0):
        features = forecast.features(adapters, found[at], levels)
        sums = np.stack([np.bincount(at, row, len(number)) for row in features]).astype(np.float64)
        found = forecast.steps(sums, levels, slower)
    return dict(zip(number, found.tolist(), strict=True))


def _rates(demand: Demand, forecast: Forecast) -> dict[AdapterRef, float]:
    """Return requests/s, none 0."""
    tokens = np.array(list(demand.tokens_per_s.values()))
    least = _IDLE * (float(tokens.mean()) or 1.0)
    rates = forecast.rates(np.maximum(tokens, least)).tolist()
    return dict(zip(demand.tokens_per_s, rates, strict=True))


def _parts_before(problem: Problem, rates: Mapping[AdapterRef, float]) -> Parts:
    """Return what nodes that are still there took of each adapter before."""
    number = {state.node: at for at, state in enumerate(problem.nodes)}
    previous = problem.previous.shares
    return {
        ref: {number[share.node]: share.part for share in previous.get(ref, ()) if share.node in number}
        for ref in rates
    }


def _node_order(count: int, before: Parts, rates: Mapping[AdapterRef, float]) -> tuple[int, ...]:
    """Order nodes by the mean rank of the requests they took before, the largest first, the unused last."""
    taken, ranks = np.zeros(count), np.zeros(count)
    for ref, parts in before.items():
        for node, part in parts.items():
            taken[node] += part * rates[ref]
            ranks[node] += part * rates[ref] * ref.rank
    mean = np.divide(ranks, taken, out=np.full(count, -1.0), where=taken > 0)
    return tuple(np.argsort(-mean, kind="stable").tolist())


@dataclass(frozen=True, slots=True, order=True)
class _SortKey:
    """An adapter's position in the order: its fields are compared one after another.

    An adapter on a node for the time that its large ranks leave is `in_tail`. Such ones come last, the first
    node's at the very end, where nodes find them again. New ones mix by hash, so that popular and rare, large
    and small ones do.
    """

    descending_rank: int
    in_tail: bool
    position: int
    mixed: int
    digest: str


def _sorted_adapters(before: Parts, order: tuple[int, ...], descends: bool) -> tuple[AdapterRef, ...]:
    positions = _positions(before, order)
    later = _largest_later(positions, len(order))

    def key(ref: AdapterRef) -> _SortKey:
        position = positions[ref]
        in_tail = descends and ref.rank < later[position]
        return _SortKey(
            descending_rank=-ref.rank if descends else 0,
            in_tail=in_tail,
            position=-position if in_tail else position,
            mixed=crc32(ref.digest.encode()),
            digest=ref.digest,
        )

    return tuple(sorted(before, key=key))


def _positions(before: Parts, order: tuple[int, ...]) -> dict[AdapterRef, int]:
    """Find the position in the order of the node that took most of each adapter; new ones come last."""
    position = {node: at for at, node in enumerate(order)}
    return {
        ref: position[max(parts, key=lambda node: parts[node])] if parts else len(order)
        for ref, parts in before.items()
    }


def _largest_later(positions: Mapping[AdapterRef, int], count: int) -> list[int]:
    """Find the largest rank on any node behind each position; 0 for the last and for what is new."""
    largest = [0] * (count + 1)
    for ref, at in positions.items():
        largest[at] = max(largest[at], ref.rank)
    later = [0] * (count + 1)
    for at in range(count - 2, -1, -1):
        later[at] = max(later[at + 1], largest[at + 1])
    return later


def _homes(problem: Problem, before: Parts) -> dict[AdapterRef, tuple[int, ...]]:
    homes = {ref: tuple(parts) for ref, parts in before.items()}
    for at, state in enumerate(problem.nodes):
        for ref in state.held:
            if ref in homes and at not in homes[ref]:
                homes[ref] += (at,)
    return homes
