"""Route as others do, to compare with: fewest requests, weights alone, Toppings."""

from dataclasses import replace

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import AdapterLoad, CostModel, StepLoad
from scheduler.cluster.routing.base import (
    Loads,
    NodeLoad,
    RouteRequest,
    drawn,
    reachable_shares,
)
from scheduler.cluster.state import RoutingTable


class LeastLoadedRouting:
    """Among the nodes of the adapter's shares, whatever their parts; ties go to the first."""

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Draw nothing."""
        nodes = (share.node for share in reachable_shares(ask, table, loads))
        return min(nodes, key=lambda node: loads[node].requests)


class WeightedRouting:
    """One draw from the adapter's shares."""

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Look at no load."""
        return drawn(reachable_shares(ask, table, loads), rng)


class ToppingsRouting:
    """The routing of Toppings (formerly CaraServe): the node on which the request costs those already there
    least.

        cost(n) = (Δprefill / average output tokens + Δdecode) · requests on n,   infinite if decode then breaks the SLO

    Δprefill is what reading the prompt adds to a step, Δdecode what the sequence adds to each later one. It
    chooses among the nodes of the adapter's shares. Where all would break `tbt_s` the one nearest to it is
    taken. Of nodes without requests, which all cost nothing, the one that decodes fastest is.
    """

    def __init__(self, model: CostModel, mean_output_tokens: float, tbt_s: float) -> None:
        self._model, self._mean_output_tokens, self._tbt_s = model, mean_output_tokens, tbt_s

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Draw nothing."""
        nodes = [share.node for share in reachable_shares(ask, table, loads)]
        return min(nodes, key=lambda node: self._cost(ask, loads[node]))

    def _cost(self, ask: RouteRequest, load: NodeLoad) -> tuple[float, float, float]:
        decoding = replace(
            load.work, adapters=tuple(replace(a, prefill_tokens=0) for a in load.work.adapters)
        )
        before_s = self._model.step_s(decoding)
        prefill_s = self._model.step_s(_with(decoding, ask.adapter, ask.prompt_tokens, 0)) - before_s
        decode_s = self._model.step_s(_with(decoding, ask.adapter, 0, 1))
        over_s = max(0.0, decode_s - self._tbt_s)
        cost = (prefill_s / self._mean_output_tokens + decode_s - before_s) * load.requests
        return over_s, cost, decode_s


def _with(work: StepLoad, adapter: AdapterRef, prompt_tokens: int, sequences: int) -> StepLoad:
    more = AdapterLoad(adapter.rank, prompt_tokens, sequences)
    return StepLoad((*work.adapters, more), work.context_tokens + prompt_tokens)
