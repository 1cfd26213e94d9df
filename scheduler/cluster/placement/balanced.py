"""Stratified placement: ours. Runs of rank that make all nodes' forecast steps alike, and standbys for routing.

    line up    adapters by rank, then by where they are; nodes by the ranks they have (`rank_order`)
    cut        one run for each node, of equal step time and within its memory (`strata`)
    stand      which node takes which run: exact assignment by the bytes that stay, among nodes that are alike
    fit        where memory does not suffice for that, what is least asked for by byte goes to where there is room
    stand by   adapters that make up most of the demand get further copies while memory lasts (`standbys`)

Memory is a hard limit: what fits nowhere is left out. The placement before stays while it is whole and its
slowest node is within `slack` of the best.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from scipy.optimize import linear_sum_assignment

from lora.adapter import AdapterRef
from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.builder import AssignmentBuilder
from scheduler.cluster.placement.partition import Piece, cut
from scheduler.cluster.placement.rank_order import RankOrder, paces, rank_order, step_seconds
from scheduler.cluster.placement.replicas import Replicas
from scheduler.cluster.state import Placement


@dataclass(frozen=True, slots=True)
class BalancedOptions:
    """`slack`: how far, relatively, the slowest step may exceed the least possible before anything moves;
    `covered`: the part of demand, from the most asked for on, whose adapters get standbys."""

    slack: float = 0.05
    covered: float = 0.8


class BalancedPlacement:
    """Decides φ by forecast step times; see the module."""

    def __init__(self, forecast: Forecast, options: BalancedOptions | None = None) -> None:
        self._forecast = forecast
        self._options = options or BalancedOptions()

    def place(self, problem: Problem) -> Placement:
        """Deterministic; the placement before where that is good enough."""
        if not problem.demand.tokens_per_s:
            return Placement(MappingProxyType({}))
        stands = rank_order(problem, self._forecast)
        line = stands.line
        found = cut(line, self._forecast) or cut(line.without_memory_limits(), self._forecast)
        assert found is not None, "steps are forecast to be finite, whatever comes"
        pieces, slowest_s = found
        if self._is_good_enough(stands, slowest_s):
            return problem.previous
        room = _fitted(stands, pieces, _standing(stands, pieces))
        self._stand_by(stands, room)
        return room.placement()

    def _is_good_enough(self, stands: RankOrder, slowest_s: float) -> bool:
        problem, previous = stands.problem, stands.problem.previous
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
        seconds = step_seconds(self._forecast, problem, previous, stands.rates)
        return max(seconds.values()) <= slowest_s * (1 + self._options.slack)

    def _stand_by(self, stands: RankOrder, room: AssignmentBuilder) -> None:
        ceilings = _ceilings(stands, room, self._forecast.model.kernel)
        standbys = Replicas(stands.problem.nodes, ceilings, room, stands.homes)
        owed = self._options.covered * sum(stands.rates.values())
        for ref in sorted(stands.refs, key=lambda ref: -stands.rates[ref]):
            if owed <= 0:
                break
            owed -= stands.rates[ref]
            standbys.add(ref)


def _standing(stands: RankOrder, pieces: list[Piece]) -> list[int]:
    """The node's number for each stratum: the most bytes stay, and only nodes that are alike change places."""
    nodes = stands.problem.nodes
    stays = np.zeros((len(nodes), len(nodes)))
    for piece in pieces:
        ref = stands.refs[piece.index]
        for node in stands.homes[ref]:
            stays[piece.node, node] += ref.nbytes * piece.part
    stays /= max(1.0, float(stays.max()))
    kinds: dict[tuple[float, int], int] = {}
    pace = paces(nodes).tolist()
    kind = [kinds.setdefault((pace[at], state.memory_bytes), len(kinds)) for at, state in enumerate(nodes)]
    stratum_kind = np.array([kind[node] for node in stands.order])
    alike = stratum_kind[:, None] == np.array(kind)[None, :]
    favour = np.zeros_like(stays)
    favour[np.arange(len(nodes)), list(stands.order)] = 1e-9
    _, chosen = linear_sum_assignment(np.where(alike, stays + favour, -1e6), maximize=True)
    return chosen.tolist()


def _fitted(stands: RankOrder, pieces: list[Piece], standing: list[int]) -> AssignmentBuilder:
    """Pieces on their nodes, as far as memory goes; the rest, the most asked for by byte first, with another
    piece of theirs, or else where the largest rank allows them, bytes are, or there is least to do."""
    room = AssignmentBuilder(stands.problem)
    pace = paces(stands.problem.nodes)
    rates = stands.rates

    def heat(piece: Piece) -> float:
        ref = stands.refs[piece.index]
        return -rates[ref] * piece.part / max(1, ref.nbytes)

    def take(ref: AdapterRef, node: int, part: float) -> None:
        room.take(ref, node, part, part * rates[ref] * float(pace[node]))

    homeless: list[tuple[AdapterRef, float]] = []
    for piece in sorted(pieces, key=heat):
        ref, node = stands.refs[piece.index], standing[piece.node]
        if room.fits(ref, node):
            take(ref, node, piece.part)
        else:
            homeless.append((ref, piece.part))
    largest = _largest(stands, room)
    for ref, part in homeless:
        if held := room.holders(ref):
            take(ref, held[0], part)
            continue
        fitting = np.flatnonzero(room.free_bytes >= ref.nbytes).tolist()
        if fitting:
            homes = stands.homes[ref]
            take(
                ref,
                min(fitting, key=lambda at: (largest[at] < ref.rank, at not in homes, room.load[at])),
                part,
            )
    return room


def _largest(stands: RankOrder, room: AssignmentBuilder) -> list[int]:
    largest = [0] * len(stands.problem.nodes)
    for ref in stands.refs:
        for node in room.holders(ref):
            largest[node] = max(largest[node], ref.rank)
    return largest


def _ceilings(stands: RankOrder, room: AssignmentBuilder, kernel: Kernel) -> list[int]:
    """The largest rank of each node, as far as that matters."""
    return [0] * len(stands.problem.nodes) if kernel is Kernel.EXACT else _largest(stands, room)


class StepMeasure:
    """Forecast step seconds over what the SLO allows between tokens, by node."""

    def __init__(self, forecast: Forecast, tbt_s: float) -> None:
        self._forecast, self._tbt_s = forecast, tbt_s

    def __call__(self, problem: Problem, placement: Placement) -> Mapping[str, float]:
        """1 is all that the SLO allows."""
        seconds = step_seconds(self._forecast, problem, placement)
        return {node: value / self._tbt_s for node, value in seconds.items()}
