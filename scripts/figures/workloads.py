"""Compare policies over traces, popularity, mixes of ranks and numbers of adapters.

    python -m scripts.figures.workloads --traces FOLDER

Policies are ours, the paper's, random placement and toppings. There is one rate a trace, padded kernels, four
nodes and three seeds. Cells are means over the seeds, geometric ones of ratios:

    P95 of the time to first token over that under ours
    goodput of ours over the best of the others
    adapter bytes kept a node as a part of full replication
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scripts.figures.cluster_run import ClusterRun, everything_gib
from scripts.figures.suite import Suite, SuiteWork, ask_each, main
from scripts.results import Row

BASELINES = ("paper", "slora-random", "toppings")
POLICIES = ("ours", *BASELINES)
TRACES = {"conv": 17.0, "code": 14.0}
LAWS = ("uniform", "power:0.3")
MIXES = ("equal", "skewed", "shifting")
COUNTS = (50, 400)
SEEDS = range(3)


def runs() -> list[ClusterRun]:
    """List every combination, seed by seed."""
    return [
        ClusterRun(policy, trace=trace, law=law, ranks=mix, adapters=count, rate=rate, seed=seed)
        for seed in SEEDS
        for trace, rate in TRACES.items()
        for law in LAWS
        for mix in MIXES
        for count in COUNTS
        for policy in POLICIES
    ]


def ask_all(work: SuiteWork) -> None:
    """Ask for all runs."""
    ask_each(work, runs())


Floats = NDArray[np.float64]
Mean = Callable[[Sequence[float]], float]
SeedRows = Mapping[str, Row]
"""The rows of one run and seed, by policy."""


def _grid(rows: Sequence[Row], trace: str, value: Callable[[SeedRows], float], mean: Mean) -> Floats:
    """Tabulate [laws and mixes, counts] over the seeds; not a number where there is no run."""
    by: dict[tuple[str, str, int], dict[int, dict[str, Row]]] = {}
    for row in rows:
        asked = row["asked"]
        if asked["trace"] == trace:
            seeds = by.setdefault((asked["law"], asked["ranks"], asked["adapters"]), {})
            seeds.setdefault(asked["seed"], {})[asked["policy"]] = row

    def over_seeds(law: str, mix: str, count: int) -> float:
        cells = by.get((law, mix, count), {}).values()
        whole = [value(cell) for cell in cells if all(policy in cell for policy in POLICIES)]
        return mean(whole) if whole else float("nan")

    return np.array([[over_seeds(law, mix, count) for count in COUNTS] for mix in MIXES for law in LAWS])


def _panel(axes: Axes, grid: Floats, title: str, ratios: bool = True) -> None:
    axes.imshow(
        np.log2(grid) if ratios else grid,
        cmap="RdYlGn" if ratios else "Blues",
        vmin=-2 if ratios else 0,
        vmax=2 if ratios else 1,
        aspect="auto",
    )
    for (line, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(COUNTS)), [str(count) for count in COUNTS])
    axes.set_xlabel("adapters")
    axes.set_title(title, fontsize=9)


def _footprint(cell: SeedRows) -> float:
    asked = cell["ours"]["asked"]
    return cell["ours"]["kept_gib_per_node"] / everything_gib(ClusterRun(**asked))


def _goodput(cell: SeedRows) -> float:
    return cell["ours"]["goodput"] / max(cell[policy]["goodput"] for policy in BASELINES)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a line for each trace."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplots(len(TRACES), len(BASELINES) + 2, sharey=True)
    names = [f"{mix}, {law}" for mix in MIXES for law in LAWS]
    for line, (trace, rate) in zip(panels, TRACES.items(), strict=True):
        for axes, policy in zip(line, BASELINES, strict=False):

            def ratio(cell: SeedRows, of: str = policy) -> float:
                return cell[of]["ttft_p95_s"] / cell["ours"]["ttft_p95_s"]

            title = f"{trace} {rate:g}/s: P95 TTFT,\n{policy} over ours"
            _panel(axes, _grid(rows, trace, ratio, geometric_mean), title)
        goodput, kept = line[-2:]
        _panel(goodput, _grid(rows, trace, _goodput, geometric_mean), "goodput, ours over\nbest of the three")
        _panel(kept, _grid(rows, trace, _footprint, fmean), "kept a node by ours,\npart of all", ratios=False)
        line[0].set_yticks(range(len(names)), names)
    return figure


SUITE = Suite("workloads", __doc__ or "", ask_all, {"workloads": draw})

if __name__ == "__main__":
    main(SUITE)
