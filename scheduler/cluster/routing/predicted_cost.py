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
_MOST_OUTLOOKS = 4096  # loads of which what follows is kept
_FETCH_LATENCY_S, _FETCH_BYTES_PER_S = 0.002, 25e9


class CostEstimator:
    """What a request would wait on a node, and make others wait, at the pace that the node told."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._output_tokens = forecast.lengths.output_tokens
        self._step_prompt_tokens = forecast.limits.step_prompt_tokens
        self._outlooks: dict[int, _Outlook] = {}

    def estimate(
        self, ask: RouteRequest, node: str, load: NodeLoad, fetch_s: float = 0.0
    ) -> tuple[float, float, float]:
        """Return the seconds to the first token, of a step from then on, and of waiting for all requests.

        The adapter takes `fetch_s` to get there. This runs for every node that is considered: what follows from
        the load and the rank is worked out once, and loads do not change.
        """
        outlook = self._outlooks.get(id(load))
        if outlook is None or outlook.load is not load:
            outlook = self._look(load)
        adapter, prompt = ask.adapter, ask.prompt_tokens
        rank = adapter.rank
        key = -rank if adapter.digest in load.adapters else rank
        decode_s, step_s = outlook.steps.get(key) or outlook.with_one_more(key)
        more_s = prompt * outlook.context_token_s
        decode_s += more_s
        step_s += more_s
        read = outlook.queued_tokens + prompt
        if ask.cached_tokens:
            read -= min(prompt - 1, ask.cached_tokens.get(node, 0))
        first_token_s = read * outlook.prefill_token_s
        if read > self._step_prompt_tokens:
            first_token_s += decode_s * read / self._step_prompt_tokens
        else:
            first_token_s += decode_s
        if outlook.context_tokens + prompt > outlook.kv_tokens:
            first_token_s = max(first_token_s, outlook.kv_wait_s(prompt, step_s))
        waiting_s = _OWN_ANSWER * step_s + outlook.batch.sequences * (step_s - outlook.step_s)
        return fetch_s + first_token_s, step_s, fetch_s + first_token_s + self._output_tokens * waiting_s

    def _look(self, load: NodeLoad) -> "_Outlook":
        if len(self._outlooks) >= _MOST_OUTLOOKS:
            self._outlooks.clear()
        found = self._outlooks[id(load)] = _Outlook(load, self._forecast.of(load.kernel, load.pace))
        return found


class _Outlook:
    """What follows from a node's load alone: its batch to come, the prompts it reads before, its mean step.

    `steps` keeps what steps last with one more sequence of a rank, its prompt apart. The rank is negative where
    its adapter is in the batch already.
    """

    __slots__ = (
        "_forecast",
        "batch",
        "context_token_s",
        "context_tokens",
        "kv_tokens",
        "load",
        "prefill_token_s",
        "queued_tokens",
        "step_s",
        "steps",
    )

    def __init__(self, load: NodeLoad, forecast: Forecast) -> None:
        self.load, self._forecast = load, forecast
        self.batch, self.queued_tokens = _batch_to_come(load, forecast.lengths.prompt_tokens)
        self.context_tokens, self.kv_tokens = self.batch.context_tokens, forecast.limits.kv_tokens
        self.context_token_s, self.prefill_token_s = (
            forecast.model.context_token_s,
            forecast.model.prefill_token_s,
        )
        self.step_s = forecast.step_s(self.batch)
        self.steps: dict[int, tuple[float, float]] = {}

    def with_one_more(self, key: int) -> tuple[float, float]:
        """Forecast the seconds of a step with one more sequence, first of one in which no prompt is read."""
        sequences, context_tokens, adapters, rank_sum, largest = self.batch
        added = max(0, key)
        batch = ForecastBatch(
            sequences=sequences + 1,
            context_tokens=context_tokens,
            adapters=adapters + (added > 0),
            rank_sum=rank_sum + added,
            largest=max(largest, abs(key)),
        )
        found = self.steps[key] = self._forecast.seconds(batch)
        return found

    def kv_wait_s(self, prompt_tokens: int, step_s: float) -> float:
        """Forecast the seconds for which a request of that prompt waits for K/V memory."""
        after = self.batch._replace(context_tokens=self.context_tokens + prompt_tokens)
        return self._forecast.kv_wait_s(after, step_s)


def _batch_to_come(load: NodeLoad, mean_prompt_tokens: float) -> tuple[ForecastBatch, int]:
    """Return the node's batch when the prompts queued there are read, and the tokens of those prompts."""
    prompt = decoding = adapters = ranks = largest = 0
    for part in load.work.adapters:
        prompt += part.prefill_tokens
        decoding += part.decode_sequences
        adapters += part.rank > 0
        ranks += part.rank
        largest = max(largest, part.rank)
    sequences = decoding + prompt / mean_prompt_tokens
    return ForecastBatch(sequences, load.work.context_tokens + prompt, adapters, ranks, largest), prompt


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
        front_doors = len(loads)
        for node, load in loads.items():
            if node not in homes and load.has_room(ask.adapter, front_doors):
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
