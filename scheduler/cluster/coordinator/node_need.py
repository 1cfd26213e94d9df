"""Tell how many nodes a demand needs, by what the placement itself goes by: its policy and its measure of load.

Nodes that do not exist yet are taken to be like the middle one of those that do. Knows no time and no history.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lora.adapter import BASE
from scheduler.cluster.placement.base import Measure, PlacementPolicy, Problem
from scheduler.cluster.state import EMPTY_PLACEMENT, Demand, NodeState, Placement, Share

MOST_BUSY = 0.5
"""The part of what the SLO leaves of a node's steps, beyond an idle step, that its work may take on the average.

Step times grow without bound as a node fills up, so the last part is worth little; chance needs the room."""

ASKED_TOKENS_PER_S = 1.0
"""From which on an adapter belongs to the working set: it is asked for about once in some minutes, or more."""

NeedReason = Literal["load", "memory"]


@dataclass(frozen=True, slots=True)
class NeededNodes:
    """So many nodes are needed, and what fewer would lack."""

    nodes: int
    reason: NeedReason = "load"


class NodeNeed:
    """Asks the placement policy what it would make of more or fewer nodes."""

    def __init__(self, policy: PlacementPolicy, measure: Measure) -> None:
        self._policy, self._measure = policy, measure

    def least(self, problem: Problem, base_rate: float, lowest: int, highest: int) -> NeededNodes:
        """Find the fewest nodes from `lowest` to `highest` that do; `highest` where none does.

        The base model is asked for `base_rate` tokens/s, which go to all nodes alike. It is taken that more nodes are
        never worse.
        """
        lacked = self.lacks(problem, base_rate, lowest)
        if lacked is None:
            return NeededNodes(lowest)
        low, high = lowest + 1, highest
        while low < high:
            middle = (low + high) // 2
            lacks = self.lacks(problem, base_rate, middle)
            if lacks is None:
                high = middle
            else:
                low, lacked = middle + 1, lacks
        return NeededNodes(min(low, highest), lacked)

    def lacks(self, problem: Problem, base_rate: float, count: int, margin: float = 1.0) -> NeedReason | None:
        """Say what `count` nodes would lack if they might be as busy as `margin` times `MOST_BUSY`; None if nothing.

        Nodes whose idle steps are already longer than the SLO allows answer nobody in time, so they do not count.
        """
        able = self._able(problem)
        count -= len(problem.nodes) - len(able)
        if not able or count < 1:
            return "load"
        resized, most = replace(problem, nodes=_resized(able, count)), margin * MOST_BUSY
        if _working_set_bytes(problem.demand) > margin * sum(state.memory_bytes for state in resized.nodes):
            return "memory"
        if self._busiest(resized, problem.previous, base_rate) <= most:
            return None  # and nothing would have to move
        busiest = self._busiest(resized, self._policy.place(resized), base_rate)
        if busiest <= most:
            return None
        return "memory" if math.isinf(busiest) else "load"

    def _busiest(self, problem: Problem, placement: Placement, base_rate: float) -> float:
        """Return how busy the busiest node would be; endless where an adapter that is asked for has no place."""
        there = {state.node for state in problem.nodes}
        rates = problem.demand.tokens_per_s
        placed = {
            ref: shares
            for ref, shares in placement.shares.items()
            if shares and all(share.node in there for share in shares)
        }
        if any(rate >= ASKED_TOKENS_PER_S and ref not in placed for ref, rate in rates.items()):
            return math.inf
        even = tuple(Share(state.node, 1 / len(there)) for state in problem.nodes)
        whole = _with_base(problem, base_rate)
        loads = self._measure(whole, Placement(MappingProxyType({**placed, BASE: even})))
        return max(_busy(loads, self._measure(whole, EMPTY_PLACEMENT)))

    def _able(self, problem: Problem) -> tuple[NodeState, ...]:
        """Return the nodes that could answer in time if they had nothing else to do."""
        idle = self._measure(_with_base(problem, 0.0), EMPTY_PLACEMENT)
        return tuple(state for state in problem.nodes if idle[state.node] < 1)


def _with_base(problem: Problem, base_rate: float) -> Problem:
    rates = problem.demand.tokens_per_s
    return replace(problem, demand=Demand(MappingProxyType({**rates, BASE: base_rate})))


def _busy(loads: Mapping[str, float], idle: Mapping[str, float]) -> Iterator[float]:
    """Return how much of what an idle step leaves each node's work takes."""
    return ((load - idle[node]) / (1 - idle[node]) for node, load in loads.items())


def _resized(states: tuple[NodeState, ...], count: int) -> tuple[NodeState, ...]:
    """Keep the first `count` nodes, or add ones like the middle one of those there are."""
    if count <= len(states):
        return states[:count]
    middle = sorted(states, key=lambda state: state.slowdown)[len(states) // 2]
    more = (replace(middle, node=f"+{at}", held=()) for at in range(count - len(states)))
    return (*states, *more)


def _working_set_bytes(demand: Demand) -> int:
    return sum(ref.nbytes for ref, rate in demand.tokens_per_s.items() if rate >= ASKED_TOKENS_PER_S)
