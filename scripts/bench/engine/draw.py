"""Draw the offline benchmark: tokens/s of every engine by workload and batch size, under the machine's limit.

    python -m scripts.bench.engine.draw results/bench_engine.jsonl --out results/bench_engine.png

There is a panel per model, dtype and batch size, a group of bars per workload, and a line over each group at
the limit. Where a results file measures the same thing twice, the later row counts.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from scripts.bench.drawing import draw_file
from scripts.results import Row, read_rows

GROUP_WIDTH = 0.8
PANEL_INCHES = (4.2, 3.2)


def distinct(rows: Sequence[Row], field: str) -> list[Any]:
    """List the values of a field in order of first appearance."""
    return list(dict.fromkeys(row[field] for row in rows))


def draw_panel(axes: Axes, rows: Sequence[Row], engines: Sequence[str]) -> None:
    """Draw the bars of one model and batch size."""
    width = GROUP_WIDTH / len(engines)
    cells = {(row["workload"], row["engine"]): row for row in rows}
    kinds = distinct(rows, "workload")
    for place, engine in enumerate(engines):
        here = [(group, cells[kind, engine]) for group, kind in enumerate(kinds) if (kind, engine) in cells]
        lefts = [group - GROUP_WIDTH / 2 + (place + 0.5) * width for group, _ in here]
        bars = axes.bar(lefts, [row["output_tok_s"] for _, row in here], width, color=f"C{place}")
        axes.bar_label(bars, fmt="%.3g", fontsize=6)
    for group, kind in enumerate(kinds):
        limit = next(row for row in rows if row["workload"] == kind)["limit"]["output_tok_s"]
        axes.hlines(limit, group - GROUP_WIDTH / 2, group + GROUP_WIDTH / 2, colors="black", linestyles="--")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylim(bottom=0)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw the whole figure."""
    batches, engines = distinct(rows, "batch"), distinct(rows, "engine")
    models = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    size = (PANEL_INCHES[0] * len(batches), PANEL_INCHES[1] * len(models) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(models), len(batches), squeeze=False)
    for (model, dtype), line in zip(models, panels, strict=True):
        for batch, axes in zip(batches, line, strict=True):
            here = (model, dtype, batch)
            draw_panel(
                axes, [row for row in rows if (row["model"], row["dtype"], row["batch"]) == here], engines
            )
            axes.set_title(f"{model} {dtype}, batch {batch}", fontsize=9)
        line[0].set_ylabel("output tokens/s, all in")
    handles = [Patch(color=f"C{place}", label=engine) for place, engine in enumerate(engines)]
    limit = Line2D([], [], color="black", linestyle="--", label="limit")
    figure.legend(handles=[*handles, limit], loc="outside lower center", ncols=len(engines) + 1, fontsize=8)
    return figure


if __name__ == "__main__":
    draw_file(__doc__, lambda path: draw(read_rows(path)))
