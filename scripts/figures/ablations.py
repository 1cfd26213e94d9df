"""Ours with one idea taken away at a time, and given the true demand.

    python -m scripts.figures.ablations --traces FOLDER

Three workloads under padded kernels, four nodes, two seeds; the rate is near the knee. The store's eviction matters
where memory is short, so the last has 400 adapters and a tight memory for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from scheduler.sim.ablations.named_policies import ABLATIONS
from scripts.figures.rows import Row
from scripts.figures.stage import Case, ask
from scripts.figures.suite import Suite, Work, main

POLICIES = ("ours", *(name for name in ABLATIONS if name.startswith("ours")), "paper")
WORKLOADS = {
    "shifting ranks": Case("", ranks="shifting", rate=17.0, seconds=50.0),
    "flash crowd": Case("", law="flash:0.3", rate=17.0, seconds=50.0),
    "skewed ranks, 400 adapters, 8 GiB a node": Case(
        "", ranks="skewed", adapters=400, memory_gib=8.0, rate=17.0, seconds=50.0
    ),
}
SEEDS = range(2)


def ask_all(work: Work) -> None:
    """A run for each workload, policy and seed."""
    cases = [
        replace(case, policy=policy, seed=seed)
        for seed in SEEDS
        for case in WORKLOADS.values()
        for policy in POLICIES
    ]
    if work.quick:
        cases = [replace(case, seconds=8.0, rate=4.0, warm_s=4.0) for case in cases[:3]]
    for case in tqdm(cases, unit="run"):
        ask(work.rows, case, work.traces)


def _found(rows: Sequence[Row], workload: Case, policy: str) -> list[Row]:
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
    """A line for each workload, a column for each figure."""
    columns: dict[str, Callable[[Row], float]] = {
        "P95 time to first token, s": lambda row: row["ttft_p95_s"],
        "P95 time between tokens, ms": lambda row: 1e3 * row["tbt_p95_s"],
        "moved, GiB": lambda row: row["moved_gib"],
        "kept a node, GiB": lambda row: row["kept_gib_per_node"],
    }
    by = {
        name: {policy: _found(rows, case, policy) for policy in POLICIES} for name, case in WORKLOADS.items()
    }
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


SUITE = Suite("ablations", "ablations", __doc__ or "", ask_all, draw)

if __name__ == "__main__":
    main(SUITE)
