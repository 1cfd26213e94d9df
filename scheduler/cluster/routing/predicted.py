"""Routing by φ, predicted cost and prefix overlap: ours.

Two nodes are drawn from φ and the one that is predicted to finish the prompt sooner takes the request (the
power of two choices, Mitzenmacher 2001): φ holds on the average, a queue that grew since the plan is avoided,
and front doors with the same stale figures do not all choose the same node.
"""

import numpy as np

from scheduler.cluster.cost import AdapterLoad, CostModel, StepLoad
from scheduler.cluster.routing.base import Ask, Loads, drawn, reachable_shares
from scheduler.cluster.state import RoutingTable

_ALIKE = 0.05  # predictions nearer than this, relatively, are not told apart


class PredictedRouting:
    """Predicted is the time to run all prompts queued on the node and this one, less what its prefix cache
    has, in one step with the sequences decoding there; between nodes alike the longer overlap decides."""

    def __init__(self, model: CostModel) -> None:
        self._model = model

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Draws twice; nodes that φ does not name are never taken while one that it names is reachable."""
        shares = reachable_shares(ask, table, loads)
        first, second = drawn(shares, rng), drawn(shares, rng)
        if first == second:
            return first
        first_s, second_s = self._prompt_s(ask, loads, first), self._prompt_s(ask, loads, second)
        if abs(first_s - second_s) > _ALIKE * max(first_s, second_s):
            return first if first_s < second_s else second
        cached = ask.cached_tokens
        return second if cached.get(second, 0) > cached.get(first, 0) else first

    def _prompt_s(self, ask: Ask, loads: Loads, node: str) -> float:
        work = loads[node].work
        tokens = max(1, ask.prompt_tokens - ask.cached_tokens.get(node, 0))
        mine = AdapterLoad(ask.adapter.rank, tokens, 0)
        return self._model.step_s(StepLoad((*work.adapters, mine), work.context_tokens + ask.prompt_tokens))
