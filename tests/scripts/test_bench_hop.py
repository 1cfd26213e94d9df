"""The benches of a live cluster: what a router adds is told from pairs, a flood by what became of its requests."""

import json
from pathlib import Path

import pytest

from scripts.bench.flood import summary as flood_summary
from scripts.bench.hop import main
from scripts.bench.hop import summary as hop_summary
from scripts.bench.live_cluster import TimedStream


def test_what_a_router_adds_is_the_median_of_the_pairs_differences() -> None:
    direct = TimedStream(200, 0.0, (0.010, 0.012, 0.014))
    routed = [
        TimedStream(200, 0.0, (0.010 + more, 0.012 + 2 * more, 0.014 + 3 * more))
        for more in (1e-3, 2e-3, 9e-3)
    ]
    found = hop_summary([(each, direct) for each in routed])
    assert found["added_ttft_ms"] == pytest.approx(2.0)
    assert found["added_token_ms"] == pytest.approx(2.0)
    assert (found["pairs"], found["node_token_ms"]) == (3, pytest.approx(2.0))


def test_refused_requests_count_as_not_in_time() -> None:
    streams = [TimedStream(200, 1.0, (1.0 + wait,)) for wait in (0.5, 1.5)]
    streams += [TimedStream(429, 1.0), TimedStream(503, 1.0)]
    found = flood_summary(streams, slo_ttft_s=1.0, took_s=2.0)
    assert (found["accepted"], found["refused"], found["failed"]) == (2, 1, 1)
    assert (found["accepted_per_s"], found["in_time_of_all"]) == (1.0, 0.25)
    assert found["ttft_p95_s"] == pytest.approx(1.45)
    assert flood_summary([TimedStream(429, 0.0)], 1.0, 1.0)["accepted"] == 0


@pytest.mark.slow
def test_a_small_run_keeps_a_row(tmp_path: Path) -> None:
    out = tmp_path / "hop.jsonl"
    main(["--pairs", "2", "--tokens", "4", "--output", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["pairs"], row["tokens"]) == (2, 4)
    assert row["router_ttft_ms"] > 0
