"""Routing by φ, predicted cost and prefix overlap: ours.

φ names the nodes that should have the adapter; of these the request goes where it is predicted to cost all
requests together the least waiting:

    its own prompt    all prompts queued there are read before it, at the pace of the steps there; what the
                      prefix cache has need not be read
    its own answer    a step for each token, as long as they will be with it there
    the others'       what it adds to their steps: its tokens, and, if its adapter is not in the batch, an adapter
                      more, of a rank that all are padded to if it is the largest and kernels pad

so requests of one adapter gather where there is room, large ranks keep to the nodes that have them, and a
queue, a slow plan or a crash is got round as soon as it shows.
"""

from dataclasses import dataclass

import numpy as np

from scheduler.cluster.forecast import Batch, Forecast
from scheduler.cluster.routing.base import Ask, Loads, NodeLoad, reachable_shares
from scheduler.cluster.state import RoutingTable

_OWN_ANSWER = 2.0  # how much more than others' waiting that of the request's own answer weighs
_ALIKE = 1e-3  # costs nearer than this, relatively, are not told apart


@dataclass(frozen=True, slots=True)
class _Queue:
    """A node's batch as it will be when the prompts queued there are read, and the tokens of those."""

    batch: Batch
    prompt_tokens: int


class PredictedRouting:
    """Of nodes alike in cost one is drawn, so that front doors do not all choose the first."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Nodes that φ does not name are never taken while one that it names is reachable."""
        nodes = [share.node for share in reachable_shares(ask, table, loads)]
        if len(nodes) == 1:
            return nodes[0]
        costs = [self._cost(ask, node, loads[node]) for node in nodes]
        least = min(costs) * (1 + _ALIKE)
        alike = [node for node, cost in zip(nodes, costs, strict=True) if cost <= least]
        return alike[int(rng.integers(len(alike)))] if len(alike) > 1 else alike[0]

    def _cost(self, ask: Ask, node: str, load: NodeLoad) -> float:
        """Seconds of waiting, of this request and of those on the node."""
        forecast, lengths = self._forecast, self._forecast.lengths
        queue = self._queue(load)
        before, after = queue.batch, _with(queue.batch, ask, ask.adapter.digest in load.adapters)
        read = queue.prompt_tokens + max(1, ask.prompt_tokens - ask.cached_tokens.get(node, 0))
        steps = max(1.0, read / forecast.step_prompt_tokens)
        first_token_s = read * forecast.model.prefill_token_s + steps * forecast.decode_s(after)
        step_s = forecast.step_s(after)
        others_s = before.sequences * (step_s - forecast.step_s(before))
        return first_token_s + lengths.output_tokens * (_OWN_ANSWER * step_s + others_s)

    def _queue(self, load: NodeLoad) -> _Queue:
        lengths, prompt, decoding, adapters, ranks, largest = self._forecast.lengths, 0, 0, 0, 0, 0
        for part in load.work.adapters:
            prompt += part.prefill_tokens
            decoding += part.decode_sequences
            adapters += part.rank > 0
            ranks += part.rank
            largest = max(largest, part.rank)
        coming = prompt / lengths.prompt_tokens
        context = load.work.context_tokens + prompt
        return _Queue(Batch(decoding + coming, context, adapters, ranks, largest), prompt)


def _with(batch: Batch, ask: Ask, is_there: bool) -> Batch:
    rank = 0 if is_there else ask.adapter.rank
    return Batch(
        sequences=batch.sequences + 1,
        context_tokens=batch.context_tokens + ask.prompt_tokens,
        adapters=batch.adapters + (rank > 0),
        rank_sum=batch.rank_sum + rank,
        largest=max(batch.largest, ask.adapter.rank),
    )
