"""Hold metrics as plain values, for whoever knows what they tell and not how Prometheus writes them.

Gateways choose servers by the series that vLLM's metrics have; these are told under vLLM's names as well.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from engine.errors import (
    AdapterBusy,
    AdapterFailed,
    AdapterHeld,
    BeyondLimit,
    Draining,
    EngineError,
    EngineStopped,
    InvalidAdapter,
    NotInTime,
    Overloaded,
    PeersSilent,
    RateLimited,
    TooManySequences,
    UnknownModel,
)
from engine.metrics.adapter_totals import Totals
from scheduler.limits import RequestRefused
from scheduler.request import InvalidParameter

MOST_RANKS = 32  # of one metric; beyond it ranks are told by the next power of two
_REASONS: Mapping[type[Exception], str] = {
    AdapterBusy: "adapter_busy",
    AdapterFailed: "adapter_failed",
    AdapterHeld: "adapter_held",
    BeyondLimit: "beyond_limit",
    Draining: "draining",
    EngineStopped: "stopped",
    InvalidAdapter: "invalid_adapter",
    InvalidParameter: "invalid_parameter",
    NotInTime: "not_in_time",
    Overloaded: "overloaded",
    PeersSilent: "peers_silent",
    RateLimited: "rate_limited",
    RequestRefused: "too_long",
    TooManySequences: "too_many_sequences",
    UnknownModel: "unknown_model",
}


@dataclass(frozen=True, slots=True)
class MetricSeries:
    """One metric: its whole name, and its samples by the values of its labels."""

    name: str
    told: str
    labels: tuple[str, ...]
    samples: Sequence[tuple[tuple[str, ...], float]]
    kind: Literal["gauge", "counter"] = "gauge"


CollectSeries = Callable[[], Sequence[MetricSeries]]
"""Tells the series of this moment."""


@dataclass(frozen=True, slots=True)
class AdapterRequests:
    """Under which adapters requests draw tokens, and under which some wait for their first; `most` may run at once."""

    running: Sequence[str]
    waiting: Sequence[str]
    most: int


class Refusals:
    """Requests that were not accepted, by the reason. Used on one event loop."""

    def __init__(self) -> None:
        self._counts = Counter[str]()

    @contextmanager
    def counted(self) -> Generator[None]:
        """Count what is raised for a client."""
        try:
            yield
        except (EngineError, RequestRefused, InvalidParameter) as error:
            self._counts[_REASONS.get(type(error), "other")] += 1
            raise

    def series(self, more: Mapping[str, int] | None = None) -> MetricSeries:
        """Tell the counts, and those that somebody else has."""
        counts = self._counts + Counter(more or {})
        samples = [((reason,), float(count)) for reason, count in sorted(counts.items())]
        told = "Requests that were refused, by the reason."
        return MetricSeries("loraserve_requests_refused", told, ("reason",), samples, "counter")


def gateway_series(
    model: str, running: int, waiting: int, kv_usage: float, adapters: AdapterRequests, most_names: int
) -> tuple[MetricSeries, ...]:
    """Tell the series that gateways read, under vLLM's names; of adapters at most so many names each."""
    labels, values = ("model_name",), (model,)
    names = (",".join(sorted(each)[:most_names]) for each in (adapters.running, adapters.waiting))
    lora = (*names, str(adapters.most))
    return (
        MetricSeries("vllm:num_requests_running", "Sequences that run.", labels, [(values, running)]),
        MetricSeries("vllm:num_requests_waiting", "Sequences that wait to run.", labels, [(values, waiting)]),
        MetricSeries(
            "vllm:kv_cache_usage_perc", "K/V memory in use; 1 is all.", labels, [(values, kv_usage)]
        ),
        MetricSeries(
            "vllm:lora_requests_info",
            "Adapters of requests; the value is the time of the scrape.",
            ("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
            [(lora, time.time())],
        ),
    )


def census_series(census: Mapping[tuple[str, int], tuple[int, int]]) -> tuple[MetricSeries, ...]:
    """Tell how many adapters there are by place and rank, and their bytes."""
    summed: dict[tuple[str, str], tuple[int, int]] = {}
    label = rank_label(rank for _, rank in census)
    for (place, rank), (count, nbytes) in sorted(census.items()):
        before = summed.get((place, label[rank]), (0, 0))
        summed[place, label[rank]] = before[0] + count, before[1] + nbytes
    counts = [(key, float(count)) for key, (count, _) in summed.items()]
    sizes = [(key, float(nbytes)) for key, (_, nbytes) in summed.items()]
    labels = ("tier", "rank")
    return (
        MetricSeries("loraserve_adapters", "Adapters that are known, by tier and rank.", labels, counts),
        MetricSeries("loraserve_adapter_bytes", "Their device memory, if they were there.", labels, sizes),
    )


def tenant_series(totals: Mapping[str, Totals]) -> tuple[MetricSeries, ...]:
    """Tell what became of tenants' requests, and their tokens."""
    ends = [((name, why), float(n)) for name, each in totals.items() for why, n in each.finished.items()]
    prompt = [((name,), float(each.prompt_tokens)) for name, each in totals.items()]
    output = [((name,), float(each.output_tokens)) for name, each in totals.items()]
    told = "Requests of tenants that ended or were refused, by what ended them."
    return (
        MetricSeries("loraserve_tenant_requests", told, ("tenant", "reason"), ends, "counter"),
        MetricSeries(
            "loraserve_tenant_prompt_tokens", "Prompt tokens of those.", ("tenant",), prompt, "counter"
        ),
        MetricSeries(
            "loraserve_tenant_output_tokens", "Tokens sampled for them.", ("tenant",), output, "counter"
        ),
    )


def rank_label(ranks: Iterable[int]) -> dict[int, str]:
    """Return the labels of ranks: themselves, or where there are many the next power of two."""
    distinct = sorted(set(ranks))
    if len(distinct) <= MOST_RANKS:
        return {rank: str(rank) for rank in distinct}
    return {rank: str(1 << (rank - 1).bit_length()) for rank in distinct}
