"""Count and time what the engine does, for Prometheus to scrape. The only module that knows prometheus_client.

It may not know requests: the engine tells it what happened, under the names of adapters that it has resolved, so that
no client's string ever becomes a label. Its registry is its own: two engines in one process do not meet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.metrics.adapter_totals import AdapterTotals, Times, Totals
from engine.metrics.series import MetricSeries, Refusals, tenant_series
from engine.metrics.snapshot import Snapshot, Standing
from engine.metrics.tracing import Tracing
from lora.peers.peer_stats import PeerStats

_NAMESPACE = "loraserve"

CONTENT_TYPE = CONTENT_TYPE_LATEST
MOST_ADAPTERS = 200
_STALLS_S = (0.02, 0.1, 1.0)


class Telemetry:
    """Counters and histograms of the `most_adapters` most recent adapters; `render` adds the gauges of a Snapshot."""

    def __init__(self, most_adapters: int = MOST_ADAPTERS, tracing: Tracing | None = None) -> None:
        self._registry = CollectorRegistry()
        self._totals = AdapterTotals(most_adapters)
        self.tenants = AdapterTotals(most_adapters)  # the same by tenant: the most recent ones
        self._gauges = _Gauges()
        self._stalls = _Stalls()
        self._lost_lines: list[Callable[[], Mapping[str, int]]] = []
        self._plain = _PlainSeries()
        self.refusals, self.tracing = Refusals(), tracing
        self._registry.register(_AdapterSeries(self._totals))
        self._registry.register(self._stalls)
        self._registry.register(self._gauges)
        self._registry.register(self._plain)

    def started(self, adapter: str) -> None:
        """Count a request that was accepted for `adapter` (the base model's name if for none)."""
        self._totals.started(adapter)

    def first_token(self, adapter: str, seconds: float) -> None:
        """Time a request's first token, which came `seconds` after its arrival."""
        self._totals.first_token(adapter, seconds)

    def next_token(self, adapter: str, seconds: float) -> None:
        """Time a sequence's token, which came `seconds` after the one before it."""
        self._totals.next_token(adapter, seconds)

    def finished(self, adapter: str, reason: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count a request that ended: `stop`, `length`, `abort` (its client left) or `error`."""
        self._totals.finished(adapter, reason, prompt_tokens, output_tokens)

    def loop_was_late(self, seconds: float) -> None:
        """Note that the event loop came to something `seconds` after it was due. Its own thread calls this."""
        self._stalls.late(seconds)

    def watch_lost_lines(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Tell from now on what `counts` returns: for each log, how many lines were left out of it."""
        self._lost_lines.append(counts)

    def recent(self) -> tuple[str, ...]:
        """List the adapters that have series of their own: those that something was counted for last."""
        return self._totals.recent()

    def totals(self) -> dict[str, Totals]:
        """Return what was counted by adapter, of all others together under `OTHER`."""
        return self._totals.snapshot()

    def render(self, snapshot: Snapshot | Standing, series: Sequence[MetricSeries] = ()) -> bytes:
        """Return everything, and `series`, in Prometheus' text format (`CONTENT_TYPE`)."""
        self._gauges.snapshot, self._plain.series = snapshot, (*self._own(), *series)
        return generate_latest(self._registry)

    def _own(self) -> Iterator[MetricSeries]:
        yield from tenant_series(self.tenants.snapshot())
        counts = {log: count for source in self._lost_lines for log, count in source().items()}
        lost = [((log,), float(count)) for log, count in counts.items()]
        told = "Lines left out, since a log was not written."
        yield MetricSeries("loraserve_log_lines_lost", told, ("log",), lost, "counter")


class _AdapterSeries(Collector):
    """The totals by adapter as metrics."""

    def __init__(self, totals: AdapterTotals) -> None:
        self._totals = totals

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        now = self._totals.snapshot()
        started = {name: totals.started for name, totals in now.items()}
        yield _counter("requests_started", "Requests accepted.", started, "adapter")
        prompt = {name: totals.prompt_tokens for name, totals in now.items()}
        yield _counter("prompt_tokens", "Prompt tokens of finished requests.", prompt, "adapter")
        output = {name: totals.output_tokens for name, totals in now.items()}
        yield _counter("output_tokens", "Tokens sampled for finished requests.", output, "adapter")
        ttft = {name: totals.ttft for name, totals in now.items()}
        told = "From a request's arrival to its first token."
        yield _histogram("time_to_first_token_seconds", told, ttft)
        tbt = {name: totals.tbt for name, totals in now.items()}
        yield _histogram("time_between_tokens_seconds", "From one token of a sequence to its next.", tbt)
        finished = CounterMetricFamily(
            f"{_NAMESPACE}_requests_finished",
            "Requests ended, by what ended them.",
            labels=("adapter", "reason"),
        )
        for name, totals in now.items():
            for reason, count in totals.finished.items():
                finished.add_metric((name, reason), count)
        yield finished


class _Stalls(Collector):
    """How often the event loop was late by how much, and by how much at most."""

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._counts = dict.fromkeys(_STALLS_S, 0)

    def late(self, seconds: float) -> None:
        self._longest_s = max(self._longest_s, seconds)
        for bound_s in _STALLS_S:
            self._counts[bound_s] += seconds > bound_s

    def collect(self) -> Iterator[Metric]:
        counts = {f"{bound_s * 1000:g}ms": count for bound_s, count in self._counts.items()}
        yield _counter("event_loop_stalls", "Times the event loop was late by more.", counts, "over")
        yield _gauge("event_loop_longest_stall_seconds", "The latest that it was.", self._longest_s)


class _PlainSeries(Collector):
    """Series that others have made as plain values."""

    def __init__(self) -> None:
        self.series: Sequence[MetricSeries] = ()

    def collect(self) -> Iterator[Metric]:
        for each in self.series:
            family = CounterMetricFamily if each.kind == "counter" else GaugeMetricFamily
            found = family(each.name, each.told, labels=each.labels)
            for values, value in each.samples:
                found.add_metric(values, value)
            yield found


class _Gauges(Collector):
    """The last Snapshot as metrics."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | Standing | None = None

    def collect(self) -> Iterator[Metric]:
        if self.snapshot is None:
            return
        yield _gauge("healthy", "1 while it does its work.", self.snapshot.trouble is None)
        if isinstance(self.snapshot, Standing):
            return
        now, blocks, store = self.snapshot, self.snapshot.blocks, self.snapshot.store
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
        yield _counter("adapter_evictions", "Adapters evicted for others.", store.evictions)
        yield _counter("adapter_hits", "Adapters found, by tier.", store.hits, "tier")
        yield from _renamed(
            "adapter_fallbacks", "adapter_misses", "Tiers that lacked an adapter.", store.fallbacks, "tier"
        )
        yield _counter("adapter_tier_bytes", "Bytes that a tier gave.", store.nbytes, "tier")
        yield _counter("adapter_tier_seconds", "Time that what a tier gave took.", store.seconds, "tier")
        yield from _peer_counters(store.peers)
        published = "Adapters copied to host memory for peers."
        yield from _renamed("lent_copies", "published_copies", published, store.published.copies)
        crowded = "Adapters not published for lack of host memory."
        yield from _renamed("lent_crowded", "publish_failures", crowded, store.published.crowded)


def _peer_counters(peers: PeerStats) -> Iterator[Metric]:
    yield _counter("peer_pulls", "Adapters pulled from peers.", peers.pulls)
    yield _counter("peer_pulled_bytes", "Their bytes.", peers.nbytes)
    yield _counter("peer_pull_seconds", "Time that pulling them took.", peers.seconds)
    mismatched = "Pulled adapters that were refused for their digest."
    yield from _renamed("peer_refused", "peer_digest_mismatches", mismatched, peers.refused)
    yield from _renamed("peer_absent", "peer_misses", "Peers that no longer had the adapter.", peers.absent)
    yield _counter("peer_failures", "Pulls that failed.", peers.failed)


def _renamed(
    former: str, name: str, told: str, value: float | Mapping[str, float], label: str = ""
) -> Iterator[Metric]:
    """Yield a counter under its name, and for this release under its former one."""
    yield _counter(name, told, value, label)
    yield _counter(former, f"Deprecated: read {_NAMESPACE}_{name}.", value, label)


def _gauge(name: str, told: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = GaugeMetricFamily(f"{_NAMESPACE}_{name}", told, labels=(label,) if label else ())
    return _filled(family, value)


def _counter(name: str, told: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    family = CounterMetricFamily(f"{_NAMESPACE}_{name}", told, labels=(label,) if label else ())
    return _filled(family, value)


def _histogram(name: str, told: str, times: Mapping[str, Times]) -> Metric:
    family = HistogramMetricFamily(f"{_NAMESPACE}_{name}", told, labels=("adapter",))
    for label, counted in times.items():
        bounds = [*map(str, counted.bounds_s), "+Inf"]
        family.add_metric((label,), list(zip(bounds, accumulate(counted.counts), strict=True)), counted.sum_s)
    return family


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, value: float | Mapping[str, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    if isinstance(value, Mapping):
        for key, part in value.items():
            family.add_metric((key,), part)
    else:
        family.add_metric((), value)
    return family
