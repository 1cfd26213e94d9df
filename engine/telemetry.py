"""Telemetry: what the node counts and times, and what a scrape reads. The only door to prometheus_client.

It may not know requests: the node tells it what happened, under the names of adapters that it has resolved,
so that no client's string ever becomes a label. Its registry is its own: two nodes in one process do not
meet.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora.peers.peer_tier import PeerStats
from lora.store.store import StoreStats
from scheduler.blocks import BlockStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "(other)"
"""The label of adapters beyond the first `MAX_LABELS` ones: a scrape stays finite, whatever is loaded."""
MAX_LABELS = 1024

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TBT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)


class Snapshot(Protocol):
    """What a scrape reads of a node at one moment."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def blocks(self) -> BlockStats: ...
    @property
    def store(self) -> StoreStats: ...


@dataclass(frozen=True, slots=True)
class _Series:
    """One adapter's own time series, looked up once."""

    started: Counter
    prompt_tokens: Counter
    output_tokens: Counter
    ttft_s: Histogram
    tbt_s: Histogram


class Telemetry:
    """Counters and histograms by adapter; `render` adds the gauges of a Snapshot."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        by = {"labelnames": ("adapter",), "namespace": "loraserve", "registry": self._registry}
        self._started = Counter("requests_started", "Requests accepted.", **by)
        self._prompt_tokens = Counter("prompt_tokens", "Prompt tokens of finished requests.", **by)
        self._output_tokens = Counter("output_tokens", "Tokens drawn for finished requests.", **by)
        self._ttft_s = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=_TTFT_BUCKETS_S, **by,
        )  # fmt: skip
        self._tbt_s = Histogram(
            "time_between_tokens_seconds", "From one token of a sequence to its next.",
            buckets=_TBT_BUCKETS_S, **by,
        )  # fmt: skip
        by["labelnames"] = ("adapter", "reason")
        self._finished = Counter("requests_finished", "Requests ended, by what ended them.", **by)
        self._gauges = _Gauges()
        self._registry.register(self._gauges)
        self._series: dict[str, _Series] = {}

    def started(self, adapter: str) -> None:
        """A request was accepted for `adapter` (the base model's name if for none)."""
        self._of(adapter).started.inc()

    def first_token(self, adapter: str, seconds: float) -> None:
        """A request's first token came `seconds` after its arrival."""
        self._of(adapter).ttft_s.observe(seconds)

    def next_token(self, adapter: str, seconds: float) -> None:
        """A sequence's token came `seconds` after the one before it."""
        self._of(adapter).tbt_s.observe(seconds)

    def finished(self, adapter: str, reason: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request ended: `stop`, `length`, `abort` (its client left) or `error`."""
        series = self._of(adapter)
        series.prompt_tokens.inc(prompt_tokens)
        series.output_tokens.inc(output_tokens)
        self._finished.labels(self._label(adapter), reason).inc()

    def render(self, snapshot: Snapshot) -> bytes:
        """Everything in Prometheus' text format (`CONTENT_TYPE`)."""
        self._gauges.snapshot = snapshot
        return generate_latest(self._registry)

    def _label(self, adapter: str) -> str:
        return adapter if adapter in self._series or len(self._series) < MAX_LABELS else OTHER

    def _of(self, adapter: str) -> _Series:
        label = self._label(adapter)
        known = self._series.get(label)
        if known is None:
            known = self._series[label] = _Series(
                self._started.labels(label),
                self._prompt_tokens.labels(label),
                self._output_tokens.labels(label),
                self._ttft_s.labels(label),
                self._tbt_s.labels(label),
            )
        return known


class _Gauges(Collector):
    """The last Snapshot as metrics."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None

    def collect(self) -> Iterator[Metric]:
        """Called by the registry, once per scrape."""
        if self.snapshot is None:
            return
        now, blocks, store = self.snapshot, self.snapshot.blocks, self.snapshot.store
        yield _gauge("healthy", "1 while the step loop runs.", now.healthy)
        yield _gauge("sequences_running", "Sequences that run.", now.running)
        yield _gauge("sequences_waiting", "Sequences that wait to run.", now.waiting)
        yield _counter("preemptions", "Sequences that gave up their K/V for others.", now.preemptions)
        yield _counter("steps", "Steps of the engine.", now.steps)
        states = {"used": blocks.used, "cached": blocks.cached, "free": blocks.free}
        yield _gauge("kv_blocks", "K/V blocks by state.", states, "state")
        yield _counter("prefix_queried_tokens", "Prompt tokens looked up.", blocks.queried_tokens)
        yield _counter("prefix_hit_tokens", "Prompt tokens the prefix cache supplied.", blocks.hit_tokens)
        yield _gauge("adapter_pages", "Rank pages of adapter memory.", store.total_pages)
        yield _gauge("adapter_pages_free", "Of these, those that hold nothing.", store.free_pages)
        yield _gauge("adapters_resident", "Adapters in device memory.", store.resident)
        yield _gauge("adapter_bytes_resident", "Their size.", store.resident_bytes)
        yield _counter("adapter_loads", "Adapters brought into device memory.", store.loads)
        yield _counter("adapter_load_seconds", "Time that bringing them took.", store.load_s)
        yield _counter("adapter_evictions", "Adapters that made room for others.", store.evictions)
        yield _counter("adapter_hits", "Adapters found, by tier.", store.hits, "tier")
        yield _counter("adapter_fallbacks", "Tiers asked in vain.", store.fallbacks, "tier")
        yield _counter("adapter_tier_seconds", "Time that what a tier gave took.", store.seconds, "tier")
        yield from _peer_counters(store.peers)
        yield _counter("lent_copies", "Adapters copied to host memory for peers.", store.lent.copies)
        yield _counter("lent_crowded", "Adapters not lent for want of room.", store.lent.crowded)


def _peer_counters(peers: PeerStats) -> Iterator[Metric]:
    yield _counter("peer_pulls", "Adapters pulled from peers.", peers.pulls)
    yield _counter("peer_pulled_bytes", "Their bytes.", peers.nbytes)
    yield _counter("peer_pull_seconds", "Time that pulling them took.", peers.seconds)
    yield _counter("peer_refused", "Pulled adapters that were refused for their digest.", peers.refused)
    yield _counter("peer_absent", "Peers asked that had let the adapter go.", peers.absent)
    yield _counter("peer_failures", "Pulls that failed.", peers.failed)


def _gauge(name: str, help_: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = GaugeMetricFamily(f"loraserve_{name}", help_, labels=(label,) if label else ())
    return _filled(family, value)


def _counter(name: str, help_: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = CounterMetricFamily(f"loraserve_{name}", help_, labels=(label,) if label else ())
    return _filled(family, value)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, value: float | Mapping[str, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    if isinstance(value, Mapping):
        for key, part in value.items():
            family.add_metric((key,), part)
    else:
        family.add_metric((), value)
    return family
