"""The tier figure shows every row of one model, each tier beside what its bytes must take."""

import json
from pathlib import Path

import pytest

from scripts.bench.tiers.draw import COLOURS, NAMES, PATHS, TierTimes, draw, read

NBYTES = {8: 1_000_000, 128: 16_000_000}


def rows(size: str, run: int) -> list[dict[str, object]]:
    """One run: how fast bytes may move, then each tier at each rank."""
    paths = [{"path": path, "bytes_per_s": 1e9 * run} for path in sorted(set(PATHS.values()))]
    timed = [
        {"tier": tier, "rank": rank, "ttft_ms": float(run * rank), "base_ms": 5.0 * run, "nbytes": nbytes}
        for tier in COLOURS
        for rank, nbytes in NBYTES.items()
    ]
    return [{"size": size, **row} for row in [*paths, *timed]]


@pytest.fixture
def results(tmp_path: Path) -> TierTimes:
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows("100m", 1) + rows("1b", 9) + rows("100m", 2)))
    return read(file, "100m")


def test_all_runs_of_one_model_are_read(results: TierTimes) -> None:
    assert results.times == {tier: {8: [8.0, 16.0], 128: [128.0, 256.0]} for tier in COLOURS}
    assert sorted(results.base) == [5.0] * 2 * len(COLOURS) + [10.0] * 2 * len(COLOURS)
    assert results.nbytes == NBYTES
    assert results.rates == dict.fromkeys(PATHS.values(), 2e9)


def test_the_limit_is_the_resident_adapter_and_its_bytes_at_the_best_rate(results: TierTimes) -> None:
    assert results.median_ms("device", 8) == 12.0
    assert results.limit_ms("stream", 8) == pytest.approx(12.0 + 0.5)
    assert results.limit_ms("host", 128) == pytest.approx(192.0 + 8.0)


def test_a_line_per_tier_with_its_limit_and_one_of_the_base(results: TierTimes) -> None:
    (axes,) = draw(results).axes
    drawn = [str(line.get_label()) for line in axes.get_lines()]
    named = [label for label in drawn if not label.startswith("_")]
    assert named == [*(NAMES.get(tier, tier) for tier in COLOURS), "base model", "limit"]
    assert len(drawn) - len(named) == len(PATHS)
