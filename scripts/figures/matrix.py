"""Compare policies over workloads, catalogues, wrong profiles and faults, all behind the same admission.

    python -m scripts.figures.matrix --traces FOLDER

A cell is one change to the first: conversations at about what four nodes carry, 100 adapters, power law 0.3, padded
kernels. Each has two minutes of traffic, two cells ten. In the picture a cell has the part of its requests that was
answered in time: mean, least and most of the seeds. Its colour says how far that is from the best policy's. Seeds
are some that no policy was tuned on.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from scripts.figures.cluster_run import ClusterRun
from scripts.figures.suite import Suite, SuiteWork, ask_each, main
from scripts.results import Row

COMPARED = ("ours", "ours-routing-only", "paper", "paper-our-routing", "toppings", "slora-random")
LEARNING = ("ours", "ours-no-learning", "ours-placement-only", "toppings")
FAULTY = ("ours", "ours-routing-only", "paper", "toppings")
ABLATED = (
    "ours",
    "ours-placement-only",
    "ours-no-spilling",
    "ours-no-splitting",
    "ours-no-replacement",
    "ours-no-permutation",
    "ours-operating-points",
    "ours-lru-store",
    "ours-oracle-demand",
)
SEEDS = range(10, 15)
BASE = ClusterRun("", rate=14.0, seconds=120.0)
LONG_S = 600.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table: a run to be asked of each policy and seed."""

    name: str
    run: ClusterRun
    policies: tuple[str, ...] = COMPARED
    seeds: Sequence[int] = SEEDS


def _cells() -> Iterator[Cell]:
    """List the cells, those that say most first."""
    zipf = replace(BASE, law="zipf:0.8")
    yield Cell("power law 0.3", BASE)
    yield Cell("zipf 0.8", zipf)
    for times, adapters in (("0.5", 220), ("0.9", 400), ("1.2", 530), ("3", 1330)):
        yield Cell(f"catalogue {times}\u00d7 memory, zipf 0.8", replace(zipf, adapters=adapters, rate=10.0))
    for kernel in ("exact", "multi-rank", "fixed"):
        yield Cell(
            f"{kernel} kernels", replace(BASE, kernel=kernel, rate=10.0 if kernel == "fixed" else 17.0)
        )
    told = "profile {} kernels, truly {}"
    yield Cell(told.format("exact", "padded"), replace(BASE, kernel="exact", true_kernel="padded"), LEARNING)
    yield Cell(told.format("padded", "exact"), replace(BASE, true_kernel="exact"), LEARNING)
    yield Cell("one node 4\u00d7 slower", replace(BASE, rate=10.0, faults="slow:4"), LEARNING)
    yield Cell("all nodes 3\u00d7 slower", replace(BASE, rate=4.0, faults="pace:3"), LEARNING)
    for faults in ("storm:10", "rolling:30", "partition:40:10", "coordinator:30:40"):
        yield Cell(f"faults {faults}", replace(BASE, rate=9.0, faults=faults), FAULTY)
    yield Cell("flash crowd on one adapter", replace(BASE, law="flash", rate=12.0))
    yield Cell("ablations, zipf 0.8", replace(zipf, adapters=220, rate=12.0), ABLATED)
    yield Cell("ablations, memory short", replace(zipf, adapters=530, rate=10.0), ABLATED)
    yield Cell("uniform", replace(BASE, law="uniform"))
    yield Cell("zipf 1.2", replace(BASE, law="zipf:1.2"))
    yield Cell("bursts (gamma, cv 2)", replace(BASE, arrivals="gamma", rate=12.0))
    yield Cell("code", replace(BASE, trace="code", rate=12.0))
    yield Cell("heavy-tailed lengths", replace(BASE, lengths="burstgpt", rate=12.0))
    yield Cell("long prompts", replace(BASE, lengths="long", rate=3.0))
    yield Cell("sessions of 4 turns, 8 tenants", replace(BASE, turns=4.0, tenants=8, system_tokens=512))
    yield Cell("skewed ranks", replace(BASE, ranks="skewed", rate=20.0))
    yield Cell("16 nodes, 400 adapters", replace(BASE, nodes=16, adapters=400, rate=56.0), COMPARED[:4])
    yield Cell("ten minutes, power law 0.3", replace(BASE, seconds=LONG_S), COMPARED[:4], SEEDS[:3])
    yield Cell("ten minutes, zipf 0.8", replace(zipf, seconds=LONG_S), COMPARED[:4], SEEDS[:3])


CELLS = tuple(_cells())


def runs() -> list[ClusterRun]:
    """List all runs, the seeds of a cell together."""
    return [
        replace(cell.run, policy=policy, seed=seed)
        for cell in CELLS
        for seed in cell.seeds
        for policy in cell.policies
    ]


def ask_all(work: SuiteWork) -> None:
    """Ask for all runs."""
    ask_each(work, runs())


def found(rows: Sequence[Row], cell: Cell, policy: str) -> list[Row]:
    """Select the rows of one policy in one cell, a seed each."""
    wanted = asdict(cell.run)
    return [
        row
        for row in rows
        if row["asked"]["policy"] == policy
        and row["asked"]["seed"] in cell.seeds
        and all(row["asked"].get(key) == wanted[key] for key in wanted.keys() - {"policy", "seed"})
    ]


def values(rows: Sequence[Row], cell: Cell) -> Mapping[str, list[float]]:
    """List the part in time of each policy of a cell that has rows."""
    by = {policy: [row["in_time"] for row in found(rows, cell, policy)] for policy in cell.policies}
    return {policy: each for policy, each in by.items() if each}


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a line for each cell that has rows, and a column for each policy."""
    cells = [cell for cell in CELLS if values(rows, cell)] or [Cell("quick", CELLS[0].run)]
    policies = list(dict.fromkeys(policy for cell in cells for policy in cell.policies))
    loss = np.full((len(cells), len(policies)), np.nan)
    figure = Figure(figsize=(1.3 * len(policies) + 3, 0.42 * len(cells) + 2), layout="constrained")
    axes = figure.subplots()
    for line, cell in enumerate(cells):
        by = values(rows, cell)
        best = max((fmean(each) for each in by.values()), default=1.0)
        for policy, each in by.items():
            column, mean = policies.index(policy), fmean(each)
            loss[line, column] = mean / best if best else 1.0
            text = f"{mean:.3f}\n{min(each):.2f}\u2013{max(each):.2f}"
            axes.text(column, line, text, ha="center", va="center", fontsize=7)
    axes.imshow(loss, cmap="RdYlGn", vmin=0.5, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(policies)), policies, rotation=30, ha="right")
    axes.set_yticks(range(len(cells)), [cell.name for cell in cells])
    return figure


SUITE = Suite("matrix", __doc__ or "", ask_all, {"matrix": draw})

if __name__ == "__main__":
    main(SUITE)
