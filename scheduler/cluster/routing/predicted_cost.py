"""Routing by φ, predicted cost and prefix overlap: ours.

φ names the nodes that should have the adapter. Of these the request goes where it is predicted to cost all
requests together the least waiting:

    its own prompt    all prompts queued there are read before it, at the pace of the steps there; what the
                      prefix cache has need not be read
    its own answer    a step for each token, as long as they will be with it there
    the others'       what it adds to their steps: its tokens, and, if its adapter is not in the batch, an adapter
                      more, of a rank that all are padded to if it is the largest and kernels pad

So requests of one adapter gather where there is room, and large ranks keep to the nodes that have them. A
queue, a slow plan or a crash is avoided as soon as it shows. Where the first token would be late on all of
these nodes, those that can fetch the adapter at once are looked at too. A node whose memory is taken is not: the
request would wait there for others to end, and those, sent the same way, for it.

A request is charged for what it alone adds. The first of a large rank on a node of small ones pays for the
padding of all that would follow it. So none goes there, and the queue at its home grows without end. Hence a
node that would keep the SLO's time to the first token comes before any that would not, whatever it costs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.cluster.cost.forecast import Forecast, ForecastBatch
from scheduler.cluster.routing.base import Loads, NodeLoad, RouteRequest, reachable_shares
from scheduler.cluster.state import RoutingTable

_LATE = 0.25  # of the SLO's time to the first token: later than this, more nodes are looked at
_OWN_ANSWER = 2.0  # how much more than others' waiting that of the request's own answer weighs
_ALIKE = 1e-3  # costs nearer than this, relatively, are not told apart
_FETCH_LATENCY_S, _FETCH_BYTES_PER_S = 0.002, 25e9


@dataclass(frozen=True, slots=True)
class _Candidate:
    """What a node promises: seconds to the first token, and of waiting for all."""

    node: str
    first_token_s: float
    cost_s: float


class PredictedCostRouting:
    """A first token is to come within `ttft_s`. Of nodes alike in cost one is drawn.

    So front doors do not all choose the first.
    """

    def __init__(self, forecast: Forecast, ttft_s: float = 2.0) -> None:
        self._forecast, self._ttft_s = forecast, ttft_s

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Return the node of least cost among those that φ names, and others only if all of these are late."""
        homes = _homes(ask, table, loads)
        candidates = [self._candidate(ask, node, loads[node]) for node in homes]
        if all(each.first_token_s > _LATE * self._ttft_s for each in candidates):
            candidates += self._fetching(ask, loads, homes)
        in_time = [each for each in candidates if each.first_token_s <= self._ttft_s]
        return _cheapest(in_time or candidates, rng)

    def _fetching(self, ask: RouteRequest, loads: Loads, homes: Sequence[str]) -> Iterable[_Candidate]:
        """Find the nodes beside `homes` with room to fetch the adapter at once."""
        fetch_s = _FETCH_LATENCY_S + ask.adapter.nbytes / _FETCH_BYTES_PER_S
        for node, load in loads.items():
            if node not in homes and load.has_room(ask.adapter):
                yield self._candidate(ask, node, load, fetch_s)

    def _candidate(self, ask: RouteRequest, node: str, load: NodeLoad, fetch_s: float = 0.0) -> _Candidate:
        forecast, lengths = self._forecast, self._forecast.lengths
        before, queued = self._batch_to_come(load)
        after = _with(before, ask, ask.adapter.digest in load.adapters)
        read = queued + max(1, ask.prompt_tokens - ask.cached_tokens.get(node, 0))
        steps = max(1.0, read / forecast.limits.step_prompt_tokens)
        step_s = forecast.step_s(after)
        read_s = read * forecast.model.prefill_token_s + steps * forecast.decode_s(after)
        first_token_s = fetch_s + max(read_s, forecast.kv_wait_s(after, step_s))
        others_s = before.sequences * (step_s - forecast.step_s(before))
        cost_s = first_token_s + lengths.output_tokens * (_OWN_ANSWER * step_s + others_s)
        return _Candidate(node, first_token_s, cost_s)

    def _batch_to_come(self, load: NodeLoad) -> tuple[ForecastBatch, int]:
        """Return the node's batch when the prompts queued there are read, and the tokens of those prompts."""
        prompt = decoding = adapters = ranks = largest = 0
        for part in load.work.adapters:
            prompt += part.prefill_tokens
            decoding += part.decode_sequences
            adapters += part.rank > 0
            ranks += part.rank
            largest = max(largest, part.rank)
        sequences = decoding + prompt / self._forecast.lengths.prompt_tokens
        return ForecastBatch(sequences, load.work.context_tokens + prompt, adapters, ranks, largest), prompt


def _homes(ask: RouteRequest, table: RoutingTable, loads: Loads) -> Sequence[str]:
    """Find the reachable nodes that φ names. If it names none all are, but those without room only if none has."""
    nodes = [share.node for share in reachable_shares(ask, table, loads)]
    if any(share.node in loads for share in table.shares.get(ask.adapter, ())):
        return nodes
    return [node for node in nodes if loads[node].has_room(ask.adapter)] or nodes


def _cheapest(candidates: Sequence[_Candidate], rng: np.random.Generator) -> str:
    """Draw one of the candidates that are alike in least cost."""
    least = min(each.cost_s for each in candidates) * (1 + _ALIKE)
    alike = [each.node for each in candidates if each.cost_s <= least]
    return alike[int(rng.integers(len(alike)))] if len(alike) > 1 else alike[0]


def _with(batch: ForecastBatch, ask: RouteRequest, is_there: bool) -> ForecastBatch:
    """Add the request to the batch; its adapter is there already or not."""
    rank = 0 if is_there else ask.adapter.rank
    return ForecastBatch(
        sequences=batch.sequences + 1,
        context_tokens=batch.context_tokens + ask.prompt_tokens,
        adapters=batch.adapters + (rank > 0),
        rank_sum=batch.rank_sum + rank,
        largest=max(batch.largest, ask.adapter.rank),
    )
