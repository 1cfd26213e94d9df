"""Routing by φ, predicted cost and prefix overlap: ours.

φ names the nodes that should have the adapter. Of these the request goes where it is predicted to cost all
requests together the least waiting:

    its own prompt    all prompts queued there are read before it, at the pace of the steps there; what the
                      prefix cache has need not be read
    its own answer    a step for each token, as long as they will be with it there
    the others'       what it adds to their steps: its tokens, and, if its adapter is not in the batch, an adapter
                      more, of a rank that all are padded to if it is the largest and kernels pad

So requests of one adapter gather where there is room, and large ranks keep to the nodes that have them. A
queue, a slow plan or a crash is avoided as soon as it shows. Where all of these nodes are busy a few others that
can fetch the adapter at once are drawn (Mitzenmacher, The power of two choices, 2001). So a decision
costs no more where there are more nodes, and routers that do not know of each other choose differently. A node
whose memory is taken is not drawn: the request would wait there for others to end, and those for it.

A request is charged for what it alone adds. The first of a large rank on a node of small ones pays for the
padding of all that would follow it. So none goes there, and the queue at its home grows without end. Hence a
node that would keep the SLO's times comes before any that would not, whatever it costs.
"""

from collections.abc import Iterable

import numpy as np

from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.routing.base import Loads, NoNodeReachable, RouteRequest, fetch_s
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.state import RoutingTable

_BUSY = 0.25  # of the SLO's times: where all are beyond this part of the way to the bound, more nodes are looked at
_DRAWN = 8  # nodes that are drawn then
_ALIKE = 1e-3  # costs nearer than this, relatively, are not told apart

_Candidate = tuple[str, float, float, float]
"""A node, seconds to the first token there, of a step, and of waiting for all."""


class PredictedCostRouting:
    """Chooses the node of least cost of those in time. Of nodes alike in cost one is drawn."""

    def __init__(self, costs: CostEstimator, slo: Slo) -> None:
        self._costs, self._slo = costs, slo

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Return the node of least cost among those that φ names, and others only if all of these are busy."""
        if not loads:
            raise NoNodeReachable(ask.adapter)
        homes = [share.node for share in table.shares.get(ask.adapter, ()) if share.node in loads]
        estimate = self._costs.estimate
        candidates: list[_Candidate] = [(node, *estimate(ask, node, loads[node])) for node in homes]
        left_s = min(ask.first_token_in_s, self._slo.ttft_s)
        if not any(self._is_at_ease(each, left_s) for each in candidates):
            candidates += self._fetching(ask, loads, homes, rng)
        if not candidates:  # no home, and no room: whoever is drawn may make some
            names = list(loads)
            return names[int(rng.integers(len(names)))]
        in_time = [each for each in candidates if each[1] <= left_s and each[2] <= self._slo.tbt_s]
        return _cheapest(in_time or candidates, rng)

    def _is_at_ease(self, candidate: _Candidate, left_s: float) -> bool:
        _, first_token_s, step_s, _ = candidate
        return first_token_s <= _BUSY * left_s and step_s <= self._slo.tbt_s

    def _fetching(
        self, ask: RouteRequest, loads: Loads, homes: list[str], rng: np.random.Generator
    ) -> Iterable[_Candidate]:
        """Draw a few nodes beside `homes` with room to fetch the adapter at once."""
        after_s = fetch_s(ask.adapter.nbytes)
        names = list(loads)
        if len(names) > _DRAWN:
            drawn: list[int] = rng.integers(len(names), size=_DRAWN).tolist()
            names = [names[at] for at in dict.fromkeys(drawn)]
        for node in names:
            load = loads[node]
            if node not in homes and load.has_room(ask.adapter):
                yield (node, *self._costs.estimate(ask, node, load, after_s))


def _cheapest(candidates: list[_Candidate], rng: np.random.Generator) -> str:
    """Draw one of the candidates that are alike in least cost."""
    least = min(each[3] for each in candidates) * (1 + _ALIKE)
    alike = [each[0] for each in candidates if each[3] <= least]
    return alike[int(rng.integers(len(alike)))] if len(alike) > 1 else alike[0]
