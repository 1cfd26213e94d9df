"""Draw rank interference: what requests of rank 8 wait for over their neighbours' rank.

    python -m scripts.bench.interference.draw results/bench_interference.jsonl --out results/bench_interference.png

It draws the latest run in the file: a row of panels per metric, a column per batch. Dots are medians of the
live engine with its own kernels and with padded ones, bands the quartiles; thin lines are a profile's cost
models.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.drawing import draw_file, label_ranks
from scripts.results import Row, read_last_run

METRICS = {"tbt": "time between tokens, ms", "ttft": "time to first token, ms"}
KERNELS = {"exact": ("C2", "o"), "padded": ("C3", "s")}
MODELS = {"exact": ("C2", "-"), "multi-rank": ("C1", "-."), "padded": ("C3", "--")}


def draw_panel(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw one batch and metric."""
    ranks = sorted({row["neighbour_rank"] for row in rows})
    for kernel, (colour, marker) in KERNELS.items():
        mine = sorted((row for row in rows if row["kernel"] == kernel), key=lambda row: row["neighbour_rank"])
        low, middle, high = np.percentile(
            [[1e3 * s for s in row["seconds"]] for row in mine], [25, 50, 75], axis=1
        )
        places = [ranks.index(row["neighbour_rank"]) for row in mine]
        axes.plot(places, middle, marker, linestyle="none", color=colour, label=f"live, {kernel} kernels")
        axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    for kernel, (colour, line) in MODELS.items():
        predicted = {ranks.index(row["neighbour_rank"]): row["model_s"].get(kernel) for row in rows}
        if None not in predicted.values():
            heights = [1e3 * predicted[place] for place in sorted(predicted)]
            axes.plot(
                sorted(predicted), heights, line, color=colour, linewidth=1, label=f"cost model, {kernel}"
            )
    label_ranks(axes, ranks)
    axes.set_ylim(bottom=0)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw the whole figure."""
    batches = list(dict.fromkeys(row["company"] for row in rows))
    figure = Figure(figsize=(4.6 * len(batches), 6.6), layout="constrained")
    grid = figure.subplots(len(METRICS), len(batches), sharex=True, squeeze=False)
    for line, (metric, label) in zip(grid, METRICS.items(), strict=True):
        for axes, batch in zip(line, batches, strict=True):
            draw_panel(axes, [row for row in rows if (row["metric"], row["company"]) == (metric, batch)])
            axes.set_title(batch, fontsize=10)
        line[0].set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("rank of the neighbours")
    grid[0][0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['base_model']} on {rows[0]['hardware']}", fontsize=9)
    return figure


if __name__ == "__main__":
    draw_file(__doc__, lambda path: draw(read_last_run(path)))
