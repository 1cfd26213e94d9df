"""Draw live engine and simulator: the distributions of both twins' times to first token and between tokens.

    python -m scripts.bench.twin.draw results/twin.jsonl --out results/twin.png

It draws the latest run in the file. A title says by how much the simulator is off, in the mean and at the
95th percentile; a thin line marks the latter.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from scripts.bench.drawing import draw_file
from scripts.results import Row, read_rows

STYLES = {"live": ("C0", "-", "live engine"), "sim": ("C3", "--", "simulator")}
PANELS = {"ttft": "time to first token, ms", "tbt": "time between tokens, ms"}


def read_run(path: Path) -> tuple[Row, list[Row]]:
    """Read what the latest run was, and its requests."""
    rows = read_rows(path)
    last = max(at for at, row in enumerate(rows) if row["what"] == "run")
    return rows[last], rows[last + 1 :]


def milliseconds(rows: Sequence[Row], twin: str, metric: str) -> NDArray[np.float64]:
    """List all times of one twin, rising."""
    mine = [np.array(row["token_times_s"], np.float64) for row in rows if row["twin"] == twin]
    starts = [row["at_s"] for row in rows if row["twin"] == twin]
    if metric == "ttft":
        return np.sort([1e3 * (times[0] - start) for times, start in zip(mine, starts, strict=True)])
    return np.sort(1e3 * np.concatenate([np.diff(times) for times in mine]))


def draw_panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Draw both distributions."""
    figures: dict[str, tuple[float, float]] = {}
    for twin, (colour, line, label) in STYLES.items():
        times = milliseconds(rows, twin, metric)
        axes.plot(times, np.arange(1, len(times) + 1) / len(times), line, color=colour, label=label)
        p95 = float(np.percentile(times, 95))
        axes.axvline(p95, color=colour, linestyle=line, linewidth=0.7, alpha=0.6)
        figures[twin] = float(times.mean()), p95
    mean, p95 = (sim / live - 1 for live, sim in zip(figures["live"], figures["sim"], strict=True))
    axes.set_title(f"mean {mean:+.1%}, P95 {p95:+.1%}", fontsize=10)
    everything = np.concatenate([milliseconds(rows, twin, metric) for twin in STYLES])
    axes.set_xscale("log")
    axes.set_xlim(left=max(0.8 * float(np.percentile(everything, 0.5)), 1e-3))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(PANELS[metric])


def draw(about: Row, rows: Sequence[Row]) -> Figure:
    """Draw the whole figure."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        draw_panel(axes, rows, metric)
    figure.axes[0].set_ylabel("part of requests (left) and of gaps (right)")
    figure.axes[0].legend()
    figure.suptitle(
        f"{about['requests']} requests at {about['rate']:.2f}/s, {about['computing']:.0%} of the time computing: "
        f"{about['hardware']}",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    draw_file(__doc__, lambda path: draw(*read_run(path)))
