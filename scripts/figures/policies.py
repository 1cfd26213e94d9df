"""Compare what policies can carry: latency over the rate, and throughput under the SLO.

    python -m scripts.figures.policies --traces FOLDER

There are several workloads, kinds of kernels, and five seeds. For each a ladder of rates is searched for the
highest at which P95 of both times is within the SLO. The search goes up from where the seed before ended while
that holds, else down. For the first seed of some workloads the whole ladder is climbed, for curves over the rate
(policies_by_rate.png).

In policies_compared.png a bar is the mean over the seeds of the highest rate (0: not even the lowest), a dot
a seed. Beside it are the mean and the number of seeds.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from scheduler.sim.ablations.named_policies import BASELINES
from scripts.figures.cluster_run import SLO, ClusterRun, ask
from scripts.figures.suite import Suite, SuiteWork, main
from scripts.results import Row

POLICIES = ("ours", *BASELINES)
COLOURS = {policy: f"C{at}" for at, policy in enumerate(POLICIES)}
COLUMNS = 3  # of panels
RATES = (5.0, 6.0, 7.0, 8.5, 10.0, 12.0, 14.0, 17.0, 20.0, 24.0, 29.0, 35.0, 42.0)
CLIMBED = RATES[2:11:2]
START = RATES.index(17.0)
SLOW_START = RATES.index(5.0)  # of the policy that the other rates would break
SEEDS = range(5)


@dataclass(frozen=True, slots=True)
class PolicyWorkload:
    """What is asked for, and by which kernels it is served."""

    name: str
    kernel: str
    trace: str = "conv"
    ranks: str = "equal"
    law: str = "power:0.3"
    climbed: bool = False

    def run(self, policy: str, rate: float, seed: int) -> ClusterRun:
        """Make one run of it."""
        return ClusterRun(policy, self.kernel, self.trace, self.ranks, self.law, rate=rate, seed=seed)


WORKLOADS = (
    PolicyWorkload("conversations, equal ranks, padded", "padded", climbed=True),
    PolicyWorkload("conversations, skewed ranks, padded", "padded", ranks="skewed"),
    PolicyWorkload("conversations, equal ranks, exact", "exact"),
    PolicyWorkload("skewed ranks, sharp popularity, padded", "padded", ranks="skewed", law="power:0.1"),
    PolicyWorkload("conversations, shifting ranks, padded", "padded", ranks="shifting"),
    PolicyWorkload("code, equal ranks, padded", "padded", trace="code"),
)
FIRST = WORKLOADS[:3]


def ask_all(work: SuiteWork) -> None:
    """Ask seed by seed, so that an interrupted suite has few seeds of the same workloads."""
    if work.quick:
        for policy in ("ours", "paper"):
            for rate in (8.0, 12.0):
                run = replace(WORKLOADS[0].run(policy, rate, 0), seconds=8.0, warm_s=4.0, adapters=10)
                ask(work.rows, run, work.traces)
        return
    rest = [load for load in WORKLOADS if load not in FIRST]
    searched = [
        (seed, load, policy)
        for loads in (FIRST, rest)
        for seed in SEEDS
        for load in loads
        for policy in POLICIES
    ]
    reached = {(load.name, "first-fit"): SLOW_START for load in WORKLOADS}
    for seed, load, policy in tqdm(searched, unit="search"):
        start = reached.get((load.name, policy), START)
        reached[load.name, policy] = _highest(work, load, policy, seed, start)
        if seed == 0 and load.climbed:
            for rate in CLIMBED:
                ask(work.rows, load.run(policy, rate, seed), work.traces)


def _highest(work: SuiteWork, load: PolicyWorkload, policy: str, seed: int, start: int) -> int:
    """Find the index of the highest rate within the SLO, -1 if there is none."""

    def meets(at: int) -> bool:
        return bool(ask(work.rows, load.run(policy, RATES[at], seed), work.traces)["meets"])

    at = max(start, 0)
    if not meets(at):
        while at >= 0 and not meets(at):
            at -= 1
        return at
    while at + 1 < len(RATES) and meets(at + 1):
        at += 1
    return at


def runs_of(rows: Sequence[Row], load: PolicyWorkload, policy: str, seed: int) -> list[Row]:
    """Select the runs of one search, by rate."""
    mine = (policy, load.kernel, load.trace, load.ranks, load.law, seed)
    found = [
        row
        for row in rows
        if tuple(row["asked"][key] for key in ("policy", "kernel", "trace", "ranks", "law", "seed")) == mine
    ]
    return sorted(found, key=lambda row: row["asked"]["rate"])


def throughput(rows: Sequence[Row]) -> float | None:
    """Find the highest rate within the SLO, requests/s; 0 if none is, None without runs."""
    return max((row["asked"]["rate"] for row in rows if row["meets"]), default=0.0) if rows else None


def present(rows: Sequence[Row]) -> Iterator[PolicyWorkload]:
    """Select the workloads that there are runs of."""
    return (load for load in WORKLOADS if any(runs_of(rows, load, "ours", seed) for seed in SEEDS))


def throughputs(rows: Sequence[Row], load: PolicyWorkload) -> Mapping[str, Sequence[float]]:
    """Find every policy's throughput for each seed that there are runs of."""
    found = {policy: [throughput(runs_of(rows, load, policy, seed)) for seed in SEEDS] for policy in POLICIES}
    return {policy: [each for each in values if each is not None] for policy, values in found.items()}


def _draw_rates(axes: Axes, runs: dict[str, list[Row]], metric: str, bound_s: float) -> None:
    """Draw a line for each policy, and the bound."""
    for policy, rows in runs.items():
        width = 2.4 if policy == "ours" else 1.2
        rates = [row["asked"]["rate"] for row in rows]
        axes.plot(
            rates, [row[metric] for row in rows], marker=".", color=COLOURS[policy], lw=width, label=policy
        )
    axes.axhline(bound_s, color="black", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.set_xlabel("requests/s, four nodes")


def draw_by_rate(rows: Sequence[Row]) -> Figure:
    """Draw a row for each workload whose ladder was climbed."""
    loads = [load for load in present(rows) if load.climbed]
    figure = Figure(figsize=(10, 3.3 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), 2, squeeze=False)
    for (ttft, tbt), load in zip(panels, loads, strict=True):
        runs = {policy: runs_of(rows, load, policy, 0) for policy in POLICIES}
        _draw_rates(ttft, runs, "ttft_p95_s", SLO.ttft_s)
        _draw_rates(tbt, runs, "tbt_p95_s", SLO.tbt_s)
        ttft.set_ylabel("P95 time to first token, s")
        tbt.set_ylabel("P95 time between tokens, s")
        ttft.set_title(load.name, fontsize=10, loc="left")
    panels[0][1].legend(fontsize=7)
    return figure


def draw_compared(rows: Sequence[Row]) -> Figure:
    """Draw a panel for each workload."""
    loads = list(present(rows))
    lines = ceil(len(loads) / COLUMNS)
    figure = Figure(figsize=(12, 3 * lines), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False, sharey=True).ravel()
    for axes, load in zip(panels, loads, strict=False):
        for at, (policy, values) in enumerate(throughputs(rows, load).items()):
            if values:
                axes.barh(at, mean(values), color=COLOURS[policy])
                axes.plot(values, [at] * len(values), "k.", markersize=5, alpha=0.6)
                axes.text(
                    0.98,
                    at,
                    f"{mean(values):.1f} ({len(values)} seeds)",
                    ha="right",
                    va="center",
                    fontsize=8,
                    transform=axes.get_yaxis_transform(),
                )
        axes.set_yticks(range(len(POLICIES)), POLICIES)
        axes.set_xlim(0, 36)
        axes.set_title(load.name, fontsize=9)
        axes.set_xlabel("requests/s within the SLO")
    panels[0].invert_yaxis()
    for axes in panels[len(loads) :]:
        axes.set_visible(False)
    return figure


SUITE = Suite(
    "policies",
    __doc__ or "",
    ask_all,
    {"policies_by_rate": draw_by_rate, "policies_compared": draw_compared},
)

if __name__ == "__main__":
    main(SUITE)
