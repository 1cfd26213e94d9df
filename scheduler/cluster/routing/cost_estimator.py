"""What a request would wait on a node, and make others wait: predicted from what the node said of its load."""

from scheduler.cluster.cost.forecast import Forecast, ForecastBatch
from scheduler.cluster.cost.model import StepLoad
from scheduler.cluster.routing.base import NodeLoad, RouteRequest

_OWN_ANSWER = 2.0  # how much more than others' waiting that of the request's own answer weighs
_BUSY = 32  # sequences on a busy node
_IDLE = NodeLoad(0, StepLoad((), 0))
_MOST_OUTLOOKS = 4096  # loads of which what follows is kept


class CostEstimator:
    """What a request would wait on a node, and make others wait, at the pace that the node told."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._output_tokens = forecast.lengths.output_tokens
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
        if read > outlook.step_rows:
            first_token_s += decode_s * read / outlook.step_rows
        else:
            first_token_s += decode_s
        full = outlook.full(prompt)
        if full > 1:
            first_token_s = max(first_token_s, (full - 1) * self._output_tokens * step_s)
        waiting_s = _OWN_ANSWER * step_s + outlook.batch.sequences * (step_s - outlook.step_s)
        return fetch_s + first_token_s, step_s, fetch_s + first_token_s + self._output_tokens * waiting_s

    def has_room(self, ask: RouteRequest, load: NodeLoad) -> bool:
        """Return whether a node of that load has a seat and K/V memory for one more request, that before it too."""
        outlook = self._outlooks.get(id(load))
        if outlook is None or outlook.load is not load:
            outlook = self._look(load)
        return outlook.full(ask.prompt_tokens) <= 1

    def idle_first_token_s(self, ask: RouteRequest) -> float:
        """Return the seconds to the first token on a node that does nothing else."""
        return self.estimate(ask, "", _IDLE)[0]

    def work_s(self, ask: RouteRequest) -> float:
        """Return the part of a busy node's time that a request takes: its prompt's, and its part of steps."""
        forecast, lengths, rank = self._forecast, self._forecast.lengths, ask.adapter.rank
        busy = ForecastBatch(_BUSY, _BUSY * lengths.prompt_tokens, _BUSY, _BUSY * rank, rank)
        drawn_s = lengths.output_tokens * forecast.decode_s(busy) / _BUSY
        return ask.prompt_tokens * forecast.model.prefill_token_s + drawn_s

    def _look(self, load: NodeLoad) -> "_Outlook":
        if len(self._outlooks) >= _MOST_OUTLOOKS:
            self._outlooks.clear()
        found = self._outlooks[id(load)] = _Outlook(load, self._forecast.of(load.kernel, load.pace))
        return found


class _Outlook:
    """What follows from a node's load alone: its batch to come, the prompts it reads before, its mean step.

    A node is full as far as its sequences, with half an answer more to each, take its seats or its K/V memory. While
    they end, in the time that an answer takes, as much is freed as there is.

    `steps` keeps what steps last with one more sequence of a rank, its prompt apart. The rank is negative where
    its adapter is in the batch already.
    """

    __slots__ = (
        "_forecast",
        "batch",
        "context_token_s",
        "full_of_sequences",
        "kv_tokens_to_come",
        "load",
        "per_kv_token",
        "prefill_token_s",
        "queued_tokens",
        "step_rows",
        "step_s",
        "steps",
    )

    def __init__(self, load: NodeLoad, forecast: Forecast) -> None:
        self.load, self._forecast = load, forecast
        self.batch, self.queued_tokens = _batch_to_come(load, forecast.lengths.prompt_tokens)
        answer = forecast.lengths.output_tokens
        self.kv_tokens_to_come = self.batch.context_tokens + (load.requests + 1) * answer / 2
        self.per_kv_token = 1 / min(load.kv_tokens, forecast.limits.kv_tokens)
        self.full_of_sequences = (load.requests + 1) / load.seats
        self.context_token_s, self.prefill_token_s = (
            forecast.model.context_token_s,
            forecast.model.prefill_token_s,
        )
        self.step_rows = min(forecast.limits.step_prompt_tokens, load.step_rows or 1 << 30)
        self.step_s = forecast.step_s(self.batch)
        self.steps: dict[int, tuple[float, float]] = {}

    def full(self, prompt_tokens: int) -> float:
        """Return how full the node is with one more request of that prompt; beyond 1 someone waits."""
        return max((self.kv_tokens_to_come + prompt_tokens) * self.per_kv_token, self.full_of_sequences)

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


def _batch_to_come(load: NodeLoad, mean_prompt_tokens: float) -> tuple[ForecastBatch, int]:
    """Return the node's batch when the prompts queued there are read, and the tokens of those prompts."""
    prompt = decoding = adapters = ranks = largest = 0
    for part in load.work.adapters:
        prompt += part.prefill_tokens
        decoding += part.decode_sequences
        adapters += part.rank > 0
        ranks += part.rank
        largest = max(largest, part.rank)
    sequences = min(load.seats, decoding + prompt / mean_prompt_tokens)
    return ForecastBatch(sequences, load.work.context_tokens + prompt, adapters, ranks, largest), prompt
