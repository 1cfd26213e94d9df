"""Draw a load run: each adapter's times to first token and between tokens over its rank.

    python scripts/figures/bench_serving.py results/bench_serving.jsonl --out results/bench_serving.png

A dot per adapter at its median and one at its 95th percentile, the base at rank 0. Small ranks that pay for
large ones would show as dots that do not rise with the rank.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]
PANELS = {"ttft": "time to first token, ms", "tbt": "time between tokens, ms"}
SHARES = {"p50": ("o", "C0", "median"), "p95": ("^", "C3", "95th percentile")}
ALL = "(all)"


def read_last_run(path: Path) -> list[Row]:
    """The rows of the latest run in a results file, less its total and the adapters without a finished
    request."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        row
        for row in rows
        if row["started"] == rows[-1]["started"] and row["model"] != ALL and "ttft_p50_ms" in row
    ]


def draw_panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """One metric over rank."""
    ranks = sorted({row["rank"] or 0 for row in rows})
    for share, (marker, colour, label) in SHARES.items():
        name = f"{metric}_{share}_ms"
        dots = [(ranks.index(row["rank"] or 0), row[name]) for row in rows if name in row]
        axes.plot(*zip(*dots, strict=True), marker, color=colour, alpha=0.6, linestyle="none", label=label)
    axes.set_xticks(range(len(ranks)), [str(rank) if rank else "base" for rank in ranks])
    axes.set_xlabel("rank")
    axes.set_ylabel(PANELS[metric])
    axes.set_ylim(bottom=0)


def draw(rows: Sequence[Row]) -> Figure:
    """The whole figure."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axes, rows, metric)
    figure.axes[0].legend()
    return figure


def main() -> None:
    """Read a results file, write a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/bench_serving.png"))
    options = parser.parse_args()
    draw(read_last_run(options.results)).savefig(options.out, dpi=150)
    print(options.out)


if __name__ == "__main__":
    main()
