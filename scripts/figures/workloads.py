"""Ours, the paper's and chance over traces, popularity, mixes of ranks and numbers of adapters.

    python -m scripts.figures.workloads --traces FOLDER

One rate a trace, padded kernels, four nodes. A cell is P95 of the time to first token over that under ours; below,
adapter bytes kept a node as a part of full replication.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from scripts.figures.rows import Row
from scripts.figures.stage import Case, ask, everything_gib
from scripts.figures.suite import Suite, Work, main

POLICIES = ("ours", "paper", "slora-random")
TRACES = {"conv": 17.0, "code": 14.0}
LAWS = ("uniform", "power:0.3")
MIXES = ("equal", "skewed", "shifting")
COUNTS = (50, 400)


def cases() -> list[Case]:
    """Every combination."""
    return [
        Case(policy, trace=trace, law=law, ranks=mix, adapters=count, rate=rate)
        for trace, rate in TRACES.items()
        for law in LAWS
        for mix in MIXES
        for count in COUNTS
        for policy in POLICIES
    ]


def ask_all(work: Work) -> None:
    """One seed."""
    chosen = cases()
    if work.quick:
        chosen = [replace(case, seconds=8.0, rate=4.0, warm_s=4.0) for case in chosen[:3]]
    for case in tqdm(chosen, unit="run"):
        ask(work.rows, case, work.traces)


def _grid(rows: Sequence[Row], trace: str, value: Callable[[dict[str, Row]], float]) -> np.ndarray:
    """[laws and mixes, counts]; not a number where a run is missing."""
    by: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        asked = row["asked"]
        if asked["trace"] == trace:
            by.setdefault((asked["law"], asked["ranks"], asked["adapters"]), {})[asked["policy"]] = row
    cells = [[by.get((law, mix, count), {}) for count in COUNTS] for mix in MIXES for law in LAWS]
    return np.array(
        [[value(cell) if len(cell) == len(POLICIES) else np.nan for cell in line] for line in cells]
    )


def _panel(axes: Axes, grid: np.ndarray, title: str, ratios: bool = True) -> None:
    axes.imshow(
        np.log2(grid) if ratios else grid,
        cmap="RdYlGn" if ratios else "Blues",
        vmin=-3 if ratios else 0,
        vmax=3 if ratios else 1,
        aspect="auto",
    )
    for (line, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(COUNTS)), [str(count) for count in COUNTS])
    axes.set_xlabel("adapters")
    axes.set_title(title, fontsize=9)


def _footprint(cell: dict[str, Row]) -> float:
    asked = cell["ours"]["asked"]
    return cell["ours"]["kept_gib_per_node"] / everything_gib(Case(**asked))


def draw(rows: Sequence[Row]) -> Figure:
    """A line for each trace."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 4, sharey=True)
    names = [f"{mix}, {law}" for mix in MIXES for law in LAWS]
    for line, (trace, rate) in zip(panels, TRACES.items(), strict=True):
        for axes, policy in zip(line, ("paper", "slora-random"), strict=False):
            ratio = _grid(
                rows, trace, lambda cell, of=policy: cell[of]["ttft_p95_s"] / cell["ours"]["ttft_p95_s"]
            )
            _panel(axes, ratio, f"{trace} {rate:g}/s, TTFT, {policy} / ours")
        ratio = _grid(
            rows, trace, lambda cell: cell["paper"]["moved_gib"] / max(0.001, cell["ours"]["moved_gib"])
        )
        _panel(line[2], ratio, "bytes moved, paper over ours")
        _panel(line[3], _grid(rows, trace, _footprint), "kept a node by ours, part of all", ratios=False)
        line[0].set_yticks(range(len(names)), names)
    return figure


SUITE = Suite("workloads", "workloads", __doc__ or "", ask_all, draw)

if __name__ == "__main__":
    main(SUITE)
