"""The problem as lines to be cut: adapters by rank, nodes by the ranks they have, both so that little moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.forecast import Crowd, Floats, Forecast
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.partition import Line
from scheduler.cluster.state import Demand, NodeState, Placement

_IDLE = 1e-6  # the demand of an adapter that nobody asks for, in parts of the mean: it still needs a place
_TIGHT = 0.5  # of all memory: where the adapters take more, it is tight
_BUSY = 0.5  # of the nodes' time: the least that is planned for there
_ROUNDS = 4  # how often a step's seconds and who is in it are reckoned from each other


@dataclass(frozen=True, slots=True)
class RankOrder:
    """`refs` and `line.crowd` in the order of cutting, `order[i]` the number of the node that stands i-th;
    `homes` the nodes that have an adapter's bytes or had a share of it."""

    problem: Problem
    refs: tuple[AdapterRef, ...]
    rates: Mapping[AdapterRef, float]
    line: Line
    order: tuple[int, ...]
    homes: Mapping[AdapterRef, tuple[int, ...]]


def rank_order(problem: Problem, forecast: Forecast) -> RankOrder:
    """Ranks descend where they disturb each other; within a rank adapters stand as their nodes do, new ones in
    an order that knows nothing of them, so that popular and rare, large and small ones mix. What is on a node for
    the time that its large ranks leave comes last, the first node's at the very end, where nodes find it again."""
    rates = planned_rates(problem, forecast)
    number = {state.node: at for at, state in enumerate(problem.nodes)}
    previous = problem.previous.shares
    before = {
        ref: {number[share.node]: share.part for share in previous.get(ref, ()) if share.node in number}
        for ref in rates
    }
    order = _node_order(len(number), before, rates)
    position = {node: at for at, node in enumerate(order)}
    by_rank = forecast.model.kernel is not Kernel.EXACT
    stands = {
        ref: position[max(parts, key=lambda node: parts[node])] if parts else len(order)
        for ref, parts in before.items()
    }
    later = _largest_later(stands, len(order))

    def key(ref: AdapterRef) -> tuple[int, bool, int, int, str]:
        at = stands[ref]
        is_tail = by_rank and ref.rank < later[at]
        rank = -ref.rank if by_rank else 0
        return rank, is_tail, -at if is_tail else at, crc32(ref.digest.encode()), ref.digest

    refs = tuple(sorted(rates, key=key))
    homes = {ref: tuple(parts) for ref, parts in before.items()}
    for at, state in enumerate(problem.nodes):
        for ref in state.held:
            if ref in homes and at not in homes[ref]:
                homes[ref] += (at,)
    levels = tuple(sorted({ref.rank for ref in refs}))
    crowd = Crowd(np.array([rates[ref] for ref in refs]), np.array([float(ref.rank) for ref in refs]))
    nbytes = np.array([float(ref.nbytes) for ref in refs])
    memory = np.array([float(problem.nodes[node].memory_bytes) for node in order])
    line = Line(crowd, nbytes, levels, paces(problem.nodes)[list(order)], memory, by_rank)
    return RankOrder(problem, refs, rates, line, order, homes)


def paces(nodes: tuple[NodeState, ...]) -> Floats:
    """[nodes]: how many times longer steps take than on the fastest kind of node there is, slowed as they are."""
    known: dict[object, float] = {}
    for state in nodes:
        points = state.operating_points
        known.setdefault(points, points.at(points.ranks[0]))
    fastest = max(known.values())
    return np.array([state.slowdown * fastest / known[state.operating_points] for state in nodes])


def planned_rates(problem: Problem, forecast: Forecast) -> dict[AdapterRef, float]:
    """Requests/s, none 0. Where memory is tight moves are slow, since what leaves a node can only leave when its
    next one has room: there a cluster that has little to do is taken to be as busy as it may soon be."""
    rates = _rates(problem.demand, forecast)
    memory_bytes = sum(state.memory_bytes for state in problem.nodes)
    if sum(ref.nbytes for ref in rates) <= _TIGHT * memory_bytes:
        return rates
    least = _BUSY * float((1 / paces(problem.nodes)).sum()) / forecast.request_s
    factor = max(1.0, least / sum(rates.values()))
    return {ref: rate * factor for ref, rate in rates.items()}


def step_seconds(
    forecast: Forecast,
    problem: Problem,
    placement: Placement,
    known: Mapping[AdapterRef, float] | None = None,
) -> dict[str, float]:
    """Forecast seconds of a step of each node under `placement`, at the rates `known` or else at those of the
    demand."""
    number = {state.node: at for at, state in enumerate(problem.nodes)}
    rates = known or _rates(problem.demand, forecast)
    parts = [
        (number[share.node], share.part * rates.get(ref, 0.0), float(ref.rank))
        for ref, shares in placement.shares.items()
        for share in shares
        if share.node in number
    ]
    table = np.array(parts).reshape(-1, 3)
    at, crowd = table[:, 0].astype(np.int64), Crowd(table[:, 1], table[:, 2])
    levels, pace = tuple(sorted({ref.rank for ref in placement.shares})), paces(problem.nodes)
    found = pace * forecast.model.base_s
    for _ in range(_ROUNDS if parts else 0):
        features = forecast.features(crowd, found[at], levels)
        sums = np.stack([np.bincount(at, row, len(number)) for row in features]).astype(np.float64)
        found = forecast.steps(sums, levels, pace)
    return dict(zip(number, found.tolist(), strict=True))


def _rates(demand: Demand, forecast: Forecast) -> dict[AdapterRef, float]:
    """Requests/s, none 0."""
    tokens = np.array(list(demand.tokens_per_s.values()))
    least = _IDLE * (float(tokens.mean()) or 1.0)
    rates = forecast.rates(np.maximum(tokens, least)).tolist()
    return dict(zip(demand.tokens_per_s, rates, strict=True))


def _largest_later(stands: Mapping[AdapterRef, int], count: int) -> list[int]:
    """The largest rank on any node that stands behind, by position; 0 for the last and for what is new."""
    largest = [0] * (count + 1)
    for ref, at in stands.items():
        largest[at] = max(largest[at], ref.rank)
    later = [0] * (count + 1)
    for at in range(count - 2, -1, -1):
        later[at] = max(later[at + 1], largest[at + 1])
    return later


def _node_order(
    count: int, before: Mapping[AdapterRef, Mapping[int, float]], rates: Mapping[AdapterRef, float]
) -> tuple[int, ...]:
    """Descending by the mean rank of the requests that nodes took before; those that took none come last."""
    taken, ranks = np.zeros(count), np.zeros(count)
    for ref, parts in before.items():
        for node, part in parts.items():
            taken[node] += part * rates[ref]
            ranks[node] += part * rates[ref] * ref.rank
    mean = np.divide(ranks, taken, out=np.full(count, -1.0), where=taken > 0)
    return tuple(np.argsort(-mean, kind="stable").tolist())
