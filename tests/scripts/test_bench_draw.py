"""The figures show every number that the results files hold."""

import json
from pathlib import Path

from matplotlib.patches import Rectangle

from scripts.bench.engine.draw import draw as draw_engine
from scripts.bench.serving.draw import draw as draw_serving
from scripts.bench.serving.draw import read_models
from scripts.results import read_rows


def test_every_engine_has_a_bar_in_every_group_that_it_was_measured_in(tmp_path: Path) -> None:
    rows = [
        {"engine": engine, "model": "100m", "dtype": "bf16", "workload": kind, "batch": batch, "output_tok_s": speed,
         "limit": {"output_tok_s": 100.0}}
        for speed, (engine, kind, batch) in enumerate(
            [("ours", "base", 1), ("ours", "mixed", 1), ("peer", "base", 1), ("ours", "base", 8), ("ours", "base", 1)],
            start=1,
        )
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    figure = draw_engine(read_rows(path))
    panels = {
        axes.get_title(): sorted(bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle))
        for axes in figure.axes
    }
    assert panels == {"100m bf16, batch 1": [2, 3, 5], "100m bf16, batch 8": [4]}
    figure.savefig(tmp_path / "figure.png")


def test_the_last_run_is_drawn_by_rank_without_its_total(tmp_path: Path) -> None:
    figures = {"ttft_p50_ms": 1.0, "ttft_p95_ms": 2.0, "tbt_p50_ms": 3.0, "tbt_p95_ms": 4.0}
    rows = [
        {"model": "old", "rank": 8, "started": "1", **figures},
        {"model": "a", "rank": 64, "started": "2", **figures},
        {"model": "base", "rank": None, "started": "2", **figures},
        {"model": "unanswered", "rank": 8, "started": "2"},
        {"model": "(all)", "rank": None, "started": "2", **figures},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_models(path)
    assert [row["model"] for row in found] == ["a", "base"]
    figure = draw_serving(found)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["base", "64"]
    figure.savefig(tmp_path / "figure.png")
