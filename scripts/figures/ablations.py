"""Compare our policy with one idea taken away at a time, and with the true demand.

    python -m scripts.figures.ablations --traces FOLDER

There are three workloads under padded kernels, four nodes and two seeds; the rate is near the knee. Eviction
matters where memory is short, so the last workload has 400 adapters and little memory for them.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scheduler.sim.ablations.named_policies import ABLATIONS
from scripts.figures.cluster_run import ClusterRun
from scripts.figures.suite import Suite, SuiteWork, ask_each, main
from scripts.results import Row

POLICIES = ("ours", *(name for name in ABLATIONS if name.startswith("ours")), "paper")
WORKLOADS = {
    "shifting ranks": ClusterRun("", ranks="shifting", rate=17.0),
    "flash crowd": ClusterRun("", law="flash:0.3", rate=17.0),
    "skewed ranks, 400 adapters, 16 GiB a node": ClusterRun(
        "", ranks="skewed", adapters=400, memory_gib=16.0, rate=17.0
    ),
}
SEEDS = range(2)


def ask_all(work: SuiteWork) -> None:
    """Ask for a run for each workload, policy and seed."""
    runs = [
        replace(run, policy=policy, seed=seed)
        for seed in SEEDS
        for run in WORKLOADS.values()
        for policy in POLICIES
    ]
    ask_each(work, runs)


def _found(rows: Sequence[Row], workload: ClusterRun, policy: str) -> list[Row]:
    ignored = {"policy": policy, "seed": 0, "rate": 0.0, "seconds": 0.0, "warm_s": 0.0}
    wanted = asdict(workload) | ignored
    return [row for row in rows if row["asked"] | ignored == wanted and row["asked"]["policy"] == policy]


def _bars(axes: Axes, found: dict[str, list[Row]], value: Callable[[Row], float]) -> None:
    means = [mean(map(value, rows)) for rows in found.values()]
    bars = axes.barh(list(found), means, color=["C0" if name == "ours" else "C7" for name in found])
    axes.bar_label(bars, [f"{each:.3g}" for each in means], padding=4, fontsize=8)
    for at, rows in enumerate(found.values()):
        axes.plot([value(row) for row in rows], [at] * len(rows), "k.", markersize=4, alpha=0.6)
    axes.margins(x=0.2)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a line for each workload, a column for each figure."""
    columns: dict[str, Callable[[Row], float]] = {
        "P95 time to first token, s": lambda row: row["ttft_p95_s"],
        "P95 time between tokens, ms": lambda row: 1e3 * row["tbt_p95_s"],
        "moved, GiB": lambda row: row["moved_gib"],
        "kept a node, GiB": lambda row: row["kept_gib_per_node"],
    }
    by = {name: {policy: _found(rows, run, policy) for policy in POLICIES} for name, run in WORKLOADS.items()}
    by = {name: {policy: mine for policy, mine in found.items() if mine} for name, found in by.items()}
    by = {name: found for name, found in by.items() if found}
    figure = Figure(figsize=(14, 2.8 * len(by)), layout="constrained")
    panels = figure.subplots(len(by), len(columns), sharey="row", squeeze=False)
    for line, (name, found) in zip(panels, by.items(), strict=True):
        for axes, (title, value) in zip(line, columns.items(), strict=True):
            _bars(axes, found, value)
            axes.set_xlabel(title, fontsize=9)
        line[0].set_title(name, fontsize=10, loc="left")
        line[0].invert_yaxis()
    return figure


SUITE = Suite("ablations", __doc__ or "", ask_all, {"ablations": draw})

if __name__ == "__main__":
    main(SUITE)
