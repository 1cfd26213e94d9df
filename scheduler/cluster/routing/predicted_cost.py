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
from scheduler.cluster.cost.model import StepLoad
from scheduler.cluster.routing.base import Loads, NodeLoad, RouteRequest, reachable_shares
from scheduler.cluster.state import RoutingTable

_LATE = 0.25  # of the SLO's time to the first token: later than this, more nodes are looked at
_OWN_ANSWER = 2.0  # how much more than others' waiting that of the request's own answer weighs
_ALIKE = 1e-3  # costs nearer than this, relatively, are not told apart
_BUSY = 32  # sequences on a busy node
_IDLE = NodeLoad(0, StepLoad((), 0))
_MOST_OUTLOOKS = 4096  # loads of which what follows is kept
_FETCH_LATENCY_S, _FETCH_BYTES_PER_S = 0.002, 25e9


class CostEstimator:
    """What a request would wait on a node, and make others wait, at the pace that the node told."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._lengths, self._limits = forecast.lengths, forecast.limits
        self._outlooks: dict[int, _NodeOutlook] = {}

    def estimate(
        self, ask: RouteRequest, node: str, load: NodeLoad, fetch_s: float = 0.0
    ) -> tuple[float, float, float]:
        """Return the seconds to the first token, of a step from then on, and of waiting for all requests.

        The adapter takes `fetch_s` to get there. This runs for every node that is considered, so what follows
        from the load alone is worked out once.
        """
        outlook = self._outlooks.get(id(load))
        if outlook is None or outlook.load is not load:
            outlook = self._look(load)
        forecast, adapter, prompt = outlook.forecast, ask.adapter, ask.prompt_tokens
        rank = adapter.rank
        added = 0 if adapter.digest in load.adapters else rank
        sequences, context_tokens, adapters, rank_sum, largest = outlook.batch
        after = ForecastBatch(
            sequences + 1,
            context_tokens + prompt,
            adapters + (added > 0),
            rank_sum + added,
            rank if rank > largest else largest,
        )
        decode_s, step_s = forecast.seconds(after)
        read = outlook.queued_tokens + max(1, prompt - ask.cached_tokens.get(node, 0))
        steps = max(1.0, read / self._limits.step_prompt_tokens)
        first_token_s = fetch_s + max(
            read * forecast.model.prefill_token_s + steps * decode_s, forecast.kv_wait_s(after, step_s)
        )
        others_s = sequences * (step_s - outlook.step_s)
        cost_s = first_token_s + self._lengths.output_tokens * (_OWN_ANSWER * step_s + others_s)
        return first_token_s, step_s, cost_s

    def idle_first_token_s(self, ask: RouteRequest) -> float:
        """Return the seconds to the first token on a node that does nothing else."""
        return self.estimate(ask, "", _IDLE)[0]

    def work_s(self, ask: RouteRequest) -> float:
        """Return the part of a busy node's time that a request takes: its prompt's, and its part of steps."""
        forecast, lengths = self._forecast, self._lengths
        batch = ForecastBatch(_BUSY, _BUSY * lengths.prompt_tokens, _BUSY, _BUSY * ask.adapter.rank, ask.adapter.rank)
        drawn_s = lengths.output_tokens * forecast.decode_s(batch) / _BUSY
        return ask.prompt_tokens * forecast.model.prefill_token_s + drawn_s

    def _look(self, load: NodeLoad) -> "_NodeOutlook":
        """Work out what follows from a load, and keep it: loads are frozen, and looked at many times."""
        forecast = self._forecast.of(load.kernel, load.pace)
        batch, queued = self._batch_to_come(load)
        found = _NodeOutlook(load, forecast, batch, queued, forecast.step_s(batch))
        if len(self._outlooks) >= _MOST_OUTLOOKS:
            self._outlooks.clear()
        self._outlooks[id(load)] = found
        return found

    def _batch_to_come(self, load: NodeLoad) -> tuple[ForecastBatch, int]:
        """Return the node's batch when the prompts queued there are read, and the tokens of those prompts."""
        prompt = decoding = adapters = ranks = largest = 0
        for part in load.work.adapters:
            prompt += part.prefill_tokens
            decoding += part.decode_sequences
            adapters += part.rank > 0
            ranks += part.rank
            largest = max(largest, part.rank)
        sequences = decoding + prompt / self._lengths.prompt_tokens
        return ForecastBatch(sequences, load.work.context_tokens + prompt, adapters, ranks, largest), prompt


@dataclass(frozen=True, slots=True)
class _NodeOutlook:
    """What follows from a node's load alone: its batch to come, the prompts it reads before, its mean step."""

    load: NodeLoad
    forecast: Forecast
    batch: ForecastBatch
    queued_tokens: int
    step_s: float


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
        self._estimator, self._ttft_s = CostEstimator(forecast), ttft_s

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
        first_token_s, _, cost_s = self._estimator.estimate(ask, node, load, fetch_s)
        return _Candidate(node, first_token_s, cost_s)


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
