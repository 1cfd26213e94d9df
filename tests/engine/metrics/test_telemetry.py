"""Telemetry: what was told is what a scrape reads, and labels stay finite."""

import re
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine.metrics.adapter_totals import OTHER
from engine.metrics.telemetry import Telemetry
from tests.chance import examples
from tests.fakes.engine_client import STORE, Stats


def scraped(telemetry: Telemetry) -> dict[str, float]:
    lines = telemetry.render(Stats(running=3, waiting=2)).decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def test_requests_tokens_and_times_are_counted_by_adapter() -> None:
    telemetry = Telemetry()
    telemetry.started("poet")
    telemetry.first_token("poet", 0.2)
    telemetry.next_token("poet", 0.03)
    telemetry.next_token("poet", 0.05)
    telemetry.finished("poet", "stop", prompt_tokens=7, output_tokens=3)
    telemetry.finished("base", "error", prompt_tokens=1, output_tokens=0)
    found = scraped(telemetry)
    expected = {
        'requests_started_total{adapter="poet"}': 1,
        'requests_finished_total{adapter="poet",reason="stop"}': 1,
        'requests_finished_total{adapter="base",reason="error"}': 1,
        'prompt_tokens_total{adapter="poet"}': 7,
        'output_tokens_total{adapter="poet"}': 3,
        'time_to_first_token_seconds_count{adapter="poet"}': 1,
        'time_to_first_token_seconds_bucket{adapter="poet",le="0.1"}': 0,
        'time_to_first_token_seconds_bucket{adapter="poet",le="0.25"}': 1,
        'time_between_tokens_seconds_count{adapter="poet"}': 2,
    }
    assert {name: found[f"loraserve_{name}"] for name in expected} == expected


def test_a_scrape_reads_the_node() -> None:
    found = scraped(Telemetry())
    expected = {
        "healthy": 1, "sequences_running": 3, "sequences_waiting": 2, "preemptions_total": 4, "steps_total": 7,
        'kv_blocks{state="used"}': 1, 'kv_blocks{state="cached"}': 2, 'kv_blocks{state="free"}': 3,
        "prefix_hit_tokens_total": 4, "prefix_queried_tokens_total": 5, "adapters_resident": 1,
        "adapter_bytes_resident": 4096, "adapter_loads_total": 2, "adapter_load_seconds_total": 0.25,
        "adapter_evictions_total": 1, 'adapter_tier_seconds_total{tier="disk"}': 0.5, "published_copies_total": 2,
        "peer_digest_mismatches_total": 6, 'adapter_hits_total{tier="host"}': 3, 'adapter_hits_total{tier="disk"}': 1,
    }  # fmt: skip
    assert {name: found[f"loraserve_{name}"] for name in expected} == expected


FORMER = {
    "adapter_fallbacks": "adapter_misses",
    "lent_copies": "published_copies",
    "lent_crowded": "publish_failures",
    "peer_absent": "peer_misses",
    "peer_refused": "peer_digest_mismatches",
}


def test_a_renamed_metric_is_there_under_both_names_and_the_former_one_says_so() -> None:
    text = Telemetry().render(Stats(0, store=replace(STORE, fallbacks={"host": 2}))).decode()
    samples = dict(re.findall(r"^(loraserve_\w+?)_total(?:\{.*\})? (.*)$", text, re.MULTILINE))
    for former, name in FORMER.items():
        assert f"# HELP loraserve_{former}_total Deprecated: read loraserve_{name}.\n" in text
        assert samples[f"loraserve_{former}"] == samples[f"loraserve_{name}"]
    assert samples["loraserve_peer_refused"] == samples["loraserve_peer_digest_mismatches"] == "6.0"


def by_label(text: str, sample: str, label: str = "adapter") -> dict[str, float]:
    """A counter's or histogram's samples of one name, summed by a label."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            if each.name == f"loraserve_{sample}":
                found[each.labels[label]] = found.get(each.labels[label], 0) + each.value
    return found


def test_labels_stay_finite_however_many_adapters_there_were() -> None:
    telemetry = Telemetry(most_adapters=3)
    for number in range(10_000):
        telemetry.started(f"adapter-{number}")
        telemetry.finished(f"adapter-{number}", "stop", 2, 1)
    text = telemetry.render(Stats(0)).decode()
    started = by_label(text, "requests_started_total")
    assert started == {"adapter-9997": 1, "adapter-9998": 1, "adapter-9999": 1, OTHER: 9997}
    assert by_label(text, "requests_finished_total") == started
    assert by_label(text, "prompt_tokens_total")[OTHER] == 2 * 9997
    assert len(text.splitlines()) < 300


def test_the_most_recent_adapters_have_their_own_series() -> None:
    telemetry = Telemetry(most_adapters=2)
    for adapter in ("old", "kept", "old", "new"):
        telemetry.started(adapter)
    text = telemetry.render(Stats(0)).decode()
    assert by_label(text, "requests_started_total") == {"old": 2, "new": 1, OTHER: 1}
    telemetry.next_token("kept", 0.1)
    text = telemetry.render(Stats(0)).decode()
    assert by_label(text, "requests_started_total") == {"new": 1, "kept": 0, OTHER: 3}


class Event(NamedTuple):
    """What one call tells of an adapter."""

    kind: str
    adapter: str
    number: int


EVENTS = st.builds(
    Event,
    st.sampled_from(["started", "first", "next", "finished", "scrape"]),
    st.sampled_from("abcdefg"),
    st.integers(0, 100),
)


@settings(max_examples=examples(60), deadline=None)
@given(most=st.integers(1, 4), events=st.lists(EVENTS, max_size=60))
def test_all_labels_together_are_the_true_totals_and_none_goes_back(most: int, events: list[Event]) -> None:
    telemetry, true, other = Telemetry(most), Counter[str](), 0.0
    for kind, adapter, number in [*events, Event("scrape", "a", 0)]:
        match kind:
            case "started":
                telemetry.started(adapter)
            case "first":
                telemetry.first_token(adapter, number)
                true["time_to_first_token_seconds_sum"] += number
            case "next":
                telemetry.next_token(adapter, number)
            case "finished":
                telemetry.finished(adapter, "stop", number, 1)
                true["prompt_tokens_total"] += number
            case _:
                text = telemetry.render(Stats(0)).decode()
                started = by_label(text, "requests_started_total")
                assert len(started) <= most + 1
                assert started.get(OTHER, 0) >= other
                other = started.get(OTHER, 0)
        true.update(
            {
                "started": {"requests_started_total": 1},
                "first": {"time_to_first_token_seconds_count": 1},
                "next": {"time_between_tokens_seconds_count": 1},
                "finished": {"requests_finished_total": 1, "output_tokens_total": 1},
            }.get(kind, {})
        )
    text = telemetry.render(Stats(0)).decode()
    assert {name: sum(by_label(text, name).values()) for name in true} == dict(true)


def test_a_histogram_s_buckets_add_up_to_its_count() -> None:
    telemetry = Telemetry()
    for seconds in (0.0, 0.005, 0.006, 59.9, 60.0, 1e9):
        telemetry.first_token("poet", seconds)
    buckets = by_label(telemetry.render(Stats(0)).decode(), "time_to_first_token_seconds_bucket", "le")
    assert (buckets["0.005"], buckets["0.01"], buckets["30.0"], buckets["60.0"], buckets["+Inf"]) == (
        2,
        3,
        3,
        5,
        6,
    )
    assert list(buckets.values()) == sorted(buckets.values())


def test_two_nodes_in_one_process_do_not_meet() -> None:
    one, other = Telemetry(), Telemetry()
    one.started("poet")
    assert not any("poet" in name for name in scraped(other))
