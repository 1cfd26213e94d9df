"""Routing by φ, predicted cost and prefix overlap: ours.

φ names the nodes that should have the adapter. Of these the request goes where it is predicted to cost all
requests together the least waiting:

    its own prompt    all prompts queued there are read before it, at the pace of the steps there; what the
                      prefix cache has need not be read
    its own answer    a step for each token, as long as they will be with it there
    the others'       what it adds to their steps: its tokens, and, if its adapter is not in the batch, an adapter
                      more, of a rank that all are padded to if it is the largest and kernels pad

So requests of one adapter gather where there is room, and large ranks keep to the nodes that have them. A
queue, a slow plan or a crash is avoided as soon as it shows.

A home that keeps the SLO's times comes before all others. Where none does a few other nodes are drawn
(Mitzenmacher, The power of two choices, 2001). So a decision costs no more where there are more nodes, and
routers that do not know of each other choose differently. Such a node is taken only while it is at ease: its
memory is not taken, a quarter of its seats is free, and its first token would come in a quarter of the time
allowed. Else all nodes would end up with all ranks as soon as all are busy, and none would carry what the plan
counts on.

Homes that are full stay in the choice then: to wait for a seat at one may cost all less than to slow another
node down.
"""

from collections.abc import Set

import numpy as np

from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.routing.base import Loads, NoNodeReachable, RouteRequest, fetch_s
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.state import RoutingTable

_EASE = 0.25  # of the time to the first token: within it, a node that is not a home is at ease
_MOST_FULL = 0.75  # how full such a node may be
_DRAWN = 8  # nodes that are drawn then
_ALIKE = 1e-3  # costs nearer than this, relatively, are not told apart

_Candidate = tuple[str, float, float, float, float]
"""A node, seconds to the first token there, of a step, and of waiting for all, and how full it would be."""


class PredictedCostRouting:
    """Chooses the node of least cost of those in time. Of nodes alike in cost one is drawn."""

    def __init__(self, costs: CostEstimator, slo: Slo) -> None:
        self._costs, self._slo = costs, slo

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Return the node of least cost among those that φ names, or another if none of these is in time."""
        if not loads:
            raise NoNodeReachable(ask.adapter)
        estimate, left_s = self._costs.estimate, min(ask.first_token_in_s, self._slo.ttft_s)
        homes: list[_Candidate] = [
            (share.node, *estimate(ask, share.node, loads[share.node]))
            for share in table.shares.get(ask.adapter, ())
            if share.node in loads
        ]
        if in_time := [each for each in homes if self._is_in_time(each, left_s)]:
            return _cheapest(in_time, rng)
        others = self._at_ease(ask, loads, {each[0] for each in homes}, left_s, rng)
        if found := others + [each for each in homes if each[4] > 1]:
            return _cheapest(found, rng)
        if homes:
            return _cheapest(homes, rng)
        names = list(loads)  # no home, and nobody is at ease: whoever is drawn may make room
        return names[int(rng.integers(len(names)))]

    def _is_in_time(self, candidate: _Candidate, left_s: float) -> bool:
        _, first_token_s, step_s, _, full = candidate
        return first_token_s <= left_s and step_s <= self._slo.tbt_s and full <= 1

    def _at_ease(
        self, ask: RouteRequest, loads: Loads, homes: Set[str], left_s: float, rng: np.random.Generator
    ) -> list[_Candidate]:
        """Draw a few nodes that are no homes, and return those at ease with room to fetch the adapter at once."""
        after_s = fetch_s(ask.adapter.nbytes)
        names = list(loads)
        if len(names) > _DRAWN:
            drawn: list[int] = rng.integers(len(names), size=_DRAWN).tolist()
            names = [names[at] for at in dict.fromkeys(drawn)]
        found: list[_Candidate] = []
        for node in names:
            load = loads[node]
            if node in homes or not load.has_room(ask.adapter):
                continue
            each = (node, *self._costs.estimate(ask, node, load, after_s))
            if self._is_in_time(each, _EASE * left_s) and each[4] <= _MOST_FULL:
                found.append(each)
        return found


def _cheapest(candidates: list[_Candidate], rng: np.random.Generator) -> str:
    """Draw one of the candidates that are alike in least cost."""
    least = min(each[3] for each in candidates) * (1 + _ALIKE)
    alike = [each[0] for each in candidates if each[3] <= least]
    return alike[int(rng.integers(len(alike)))] if len(alike) > 1 else alike[0]
