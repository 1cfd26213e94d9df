"""The tier figure shows the latest run and no other."""

import json
from pathlib import Path

from scripts.figures.tiers import COLOURS, draw, read_last_run


def test_only_the_latest_run_is_drawn_a_line_per_tier(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    rows = [
        {"started": started, "tier": tier, "rank": rank, "ttft_ms": float(started * rank)}
        for started in (1, 2)
        for tier in COLOURS
        for rank in (8, 128)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    times = read_last_run(file)
    assert {tier: dict(found) for tier, found in times.items()} == {
        tier: {8: [16.0], 128: [256.0]} for tier in COLOURS
    }
    (axes,) = draw(times).axes
    assert [line.get_label() for line in axes.get_lines()] == list(COLOURS)
