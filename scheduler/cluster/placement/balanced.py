"""Balanced placement: ours. Runs of rank that make all nodes' forecast steps alike.

    order      adapters by rank, then by where they are; nodes by the ranks they have (`rank_order`)
    partition  one run for each node, of equal step time and within its memory (`partition`)
    assign     which node takes which run: exact assignment by the bytes that stay, among nodes that are alike
    fit        where memory does not suffice for that, what is least asked for by byte goes where there is room
    replicate  where nodes name several zones, adapters that make up most of the demand get a copy in another
               zone while memory lasts (`replicas`). Copies within one zone were measured to be worth nothing:
               routers have no use for them, and after a crash an adapter is back before its requests time out

Memory is a hard limit: what fits nowhere is left out. The placement before stays while it is whole and its
slowest node is within `slack` of the best.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.placement.assignment import best_assignment
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.builder import AssignmentBuilder
from scheduler.cluster.placement.partition import Piece, partition
from scheduler.cluster.placement.rank_order import RankOrder, rank_order, slowdowns, step_seconds
from scheduler.cluster.placement.replicas import Replicas
from scheduler.cluster.state import Placement


@dataclass(frozen=True, slots=True)
class BalancedOptions:
    """When to leave things alone, and how much to replicate.

    `slack` is how far, relatively, the slowest step may exceed the least possible before anything moves.
    `covered` is the part of demand, from the most asked for on, whose adapters get replicas in other zones.
    """

    slack: float = 0.05
    covered: float = 0.8


class BalancedPlacement:
    """Decides φ by forecast step times; see the module."""

    def __init__(self, forecast: Forecast, options: BalancedOptions | None = None) -> None:
        self._forecast = forecast
        self._options = options or BalancedOptions()

    def place(self, problem: Problem) -> Placement:
        """Return a placement, the one before where that is good enough. The same problem gives the same one."""
        if not problem.demand.tokens_per_s:
            return Placement(MappingProxyType({}))
        ordered = rank_order(problem, self._forecast)
        to_partition = ordered.partition_problem
        found = partition(to_partition, self._forecast) or partition(
            to_partition.without_memory_limits(), self._forecast
        )
        assert found is not None, "steps are forecast to be finite, whatever comes"
        if self._is_good_enough(ordered, found.slowest_s):
            return problem.previous
        builder = _fitted(ordered, found.pieces, _nodes_of_runs(ordered, found.pieces))
        if len({state.zone for state in problem.nodes}) > 1:
            self._replicate(ordered, builder)
        return builder.placement()

    def _is_good_enough(self, ordered: RankOrder, slowest_s: float) -> bool:
        problem, previous = ordered.problem, ordered.problem.previous
        nodes = {state.node: state for state in problem.nodes}
        used = dict.fromkeys(nodes, 0)
        for ref, shares in previous.shares.items():
            if not shares or any(share.node not in nodes for share in shares):
                return False
            for share in shares:
                used[share.node] += ref.nbytes
        whole = previous.shares.keys() == problem.demand.tokens_per_s.keys()
        if not whole or any(used[node] > state.memory_bytes for node, state in nodes.items()):
            return False
        seconds = step_seconds(self._forecast, problem, previous, ordered.rates)
        return max(seconds.values()) <= slowest_s * (1 + self._options.slack)

    def _replicate(self, ordered: RankOrder, builder: AssignmentBuilder) -> None:
        nodes = ordered.problem.nodes
        padded = self._forecast.model.kernel.mixes
        ceilings = _largest_ranks(ordered, builder) if padded else [0] * len(nodes)
        replicas = Replicas(nodes, ceilings, builder, ordered.homes)
        to_cover = self._options.covered * sum(ordered.rates.values())
        for ref in sorted(ordered.refs, key=lambda ref: -ordered.rates[ref]):
            if to_cover <= 0:
                break
            to_cover -= ordered.rates[ref]
            replicas.add(ref)


def _nodes_of_runs(ordered: RankOrder, pieces: list[Piece]) -> list[int]:
    """Number the node for each run: the most bytes stay, and only nodes that are alike change places."""
    nodes = ordered.problem.nodes
    stays = np.zeros((len(nodes), len(nodes)))
    for piece in pieces:
        ref = ordered.refs[piece.index]
        for node in ordered.homes[ref]:
            stays[piece.node, node] += ref.nbytes * piece.part
    stays /= max(1.0, float(stays.max()))
    kinds: dict[tuple[float, int], int] = {}
    slower = slowdowns(nodes).tolist()
    kind = [kinds.setdefault((slower[at], state.memory_bytes), len(kinds)) for at, state in enumerate(nodes)]
    run_kind = np.array([kind[node] for node in ordered.node_order])
    alike = run_kind[:, None] == np.array(kind)[None, :]
    favour = np.zeros_like(stays)
    favour[np.arange(len(nodes)), list(ordered.node_order)] = 1e-9
    return best_assignment(np.where(alike, stays + favour, -1e6))


def _fitted(ordered: RankOrder, pieces: list[Piece], nodes_of_runs: list[int]) -> AssignmentBuilder:
    """Put pieces on their nodes as far as memory goes, the most asked for by byte first.

    The rest goes to another piece of the same adapter. Else it goes where the largest rank allows it, where
    its bytes are, or where there is least to do, in this order.
    """
    builder = AssignmentBuilder(ordered.problem)
    slower = slowdowns(ordered.problem.nodes)
    rates = ordered.rates

    def rate_by_byte(piece: Piece) -> float:
        ref = ordered.refs[piece.index]
        return -rates[ref] * piece.part / max(1, ref.nbytes)

    def take(ref: AdapterRef, node: int, part: float) -> None:
        builder.take(ref, node, part, part * rates[ref] * float(slower[node]))

    without_room: list[tuple[AdapterRef, float]] = []
    for piece in sorted(pieces, key=rate_by_byte):
        ref, node = ordered.refs[piece.index], nodes_of_runs[piece.node]
        if builder.fits(ref, node):
            take(ref, node, piece.part)
        else:
            without_room.append((ref, piece.part))
    largest = _largest_ranks(ordered, builder)
    for ref, part in without_room:
        if held := builder.holders(ref):
            take(ref, held[0], part)
            continue
        fitting: list[int] = np.flatnonzero(builder.free_bytes >= ref.nbytes).tolist()
        if fitting:
            homes = ordered.homes[ref]
            best = min(fitting, key=lambda at: (largest[at] < ref.rank, at not in homes, builder.load[at]))
            take(ref, best, part)
    return builder


def _largest_ranks(ordered: RankOrder, builder: AssignmentBuilder) -> list[int]:
    largest = [0] * len(ordered.problem.nodes)
    for ref in ordered.refs:
        for node in builder.holders(ref):
            largest[node] = max(largest[node], ref.rank)
    return largest


class StepMeasure:
    """Forecast step seconds over what the SLO allows between tokens, by node."""

    def __init__(self, forecast: Forecast, tbt_s: float) -> None:
        self._forecast, self._tbt_s = forecast, tbt_s

    def __call__(self, problem: Problem, placement: Placement) -> Mapping[str, float]:
        """Measure each node's load; 1 is all that the SLO allows."""
        seconds = step_seconds(self._forecast, problem, placement)
        return {node: value / self._tbt_s for node, value in seconds.items()}
