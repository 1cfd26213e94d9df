"""Telemetry: what was told is what a scrape reads, and labels stay finite."""

import re
from dataclasses import replace

from engine.telemetry import MAX_LABELS, OTHER, Telemetry
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


def test_labels_stay_finite_however_many_adapters_there_were() -> None:
    telemetry = Telemetry()
    for number in range(MAX_LABELS + 10):
        telemetry.started(f"adapter-{number}")
        telemetry.finished(f"adapter-{number}", "stop", 1, 1)
    found = scraped(telemetry)
    labels = {match[1] for name in found if (match := re.search(r'adapter="([^"]*)"', name))}
    assert len(labels) == MAX_LABELS + 1
    assert found[f'loraserve_requests_started_total{{adapter="{OTHER}"}}'] == 10
    assert found[f'loraserve_requests_finished_total{{adapter="{OTHER}",reason="stop"}}'] == 10


def test_two_nodes_in_one_process_do_not_meet() -> None:
    one, other = Telemetry(), Telemetry()
    one.started("poet")
    assert not any("poet" in name for name in scraped(other))
