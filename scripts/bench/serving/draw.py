"""Draw a load run: each adapter's times to first token and between tokens over its rank.

    python -m scripts.bench.serving.draw results/bench_serving.jsonl --out results/bench_serving.png

Each adapter has a dot at its median and one at its 95th percentile; the base is at rank 0. Small ranks that
pay for large ones would show as dots that do not rise with the rank.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.drawing import draw_file, label_ranks
from scripts.results import Row, read_last_run

PANELS = {"ttft": "time to first token, ms", "tbt": "time between tokens, ms"}
SHARES = {"p50": ("o", "C0", "median"), "p95": ("^", "C3", "95th percentile")}
ALL = "(all)"


def read_models(path: Path) -> list[Row]:
    """Read the latest run, without its total and the adapters that have no finished request."""
    return [row for row in read_last_run(path) if row["model"] != ALL and "ttft_p50_ms" in row]


def draw_panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Draw one metric over rank."""
    ranks = sorted({row["rank"] or 0 for row in rows})
    for share, (marker, colour, label) in SHARES.items():
        name = f"{metric}_{share}_ms"
        dots = [(ranks.index(row["rank"] or 0), row[name]) for row in rows if name in row]
        axes.plot(*zip(*dots, strict=True), marker, color=colour, alpha=0.6, linestyle="none", label=label)
    label_ranks(axes, ranks)
    axes.set_xlabel("rank")
    axes.set_ylabel(PANELS[metric])
    axes.set_ylim(bottom=0)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw the whole figure."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axes, rows, metric)
    figure.axes[0].legend()
    return figure


if __name__ == "__main__":
    draw_file(__doc__, lambda path: draw(read_models(path)))
