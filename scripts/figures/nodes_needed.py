"""Find how many nodes each policy needs for a given load under the SLO, as the capacity planner does.

    python -m scripts.figures.nodes_needed --traces FOLDER

The load is 24 requests/s for 220 adapters, by two laws of popularity and two kinds of kernels. Nodes are the mean of
two seeds that no tuning saw. Where the most nodes that are tried do not suffice the bar ends there. Below are adapter
bytes held a node against full replication.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean

from matplotlib.figure import Figure
from tqdm import tqdm

from scheduler.sim.ablations.named_policies import named
from scheduler.sim.planner.search import PlanQuestion, needed
from scripts.figures.cluster_run import GIB, ClusterRun, Traces, everything_gib, hardware, traffic
from scripts.figures.suite import Suite, SuiteWork, main
from scripts.results import Row

POLICIES = ("ours", "ours-routing-only", "paper", "paper-our-routing", "slora-contiguous", "toppings")
COLOURS = {policy: f"C{at}" for at, policy in enumerate(POLICIES)}
LOADS = {
    "power law 0.3, padded": ClusterRun("", "padded", rate=24.0, nodes=0, adapters=220),
    "zipf 0.8, padded": ClusterRun("", "padded", law="zipf:0.8", rate=24.0, nodes=0, adapters=220),
    "zipf 0.8, exact": ClusterRun("", "exact", law="zipf:0.8", rate=24.0, nodes=0, adapters=220),
}
SEEDS = range(10, 12)
MOST = 12


def answer(run: ClusterRun, most: int, traces: Traces) -> Row:
    """Find the fewest nodes that are enough, null if even the most are not, and what each then holds."""
    offered = traffic(run, traces)
    question = PlanQuestion(hardware(run, offered), offered, 1.0, most, run.seed)
    need = needed(question, named(run.policy), lambda policy, nodes, part: None)
    found = need.fewest
    kept = need.best.replay.last.kept_bytes / need.best.nodes / GIB
    return {
        "nodes": found.nodes if found else None,
        "tried": [trial.nodes for trial in need.trials],
        "kept_gib_per_node": round(kept, 3),
        "everything_gib": round(everything_gib(run), 3),
    }


def ask(work: SuiteWork) -> None:
    """Ask for a search for each load, policy and seed."""
    runs = [
        replace(run, policy=policy, seed=seed)
        for seed in SEEDS
        for run in LOADS.values()
        for policy in POLICIES
    ]
    if work.quick:
        runs = [replace(run, seconds=8.0, rate=4.0, warm_s=4.0, adapters=10) for run in runs[:2]]
    for run in tqdm(runs, unit="search"):
        most = 2 if work.quick else MOST
        asked = {**asdict(run), "most": most}
        work.rows.ask(asked, lambda run=run, most=most: answer(run, most, work.traces))


def _found(rows: Sequence[Row], load: ClusterRun, policy: str) -> list[Row]:
    wanted = (policy, load.kernel, load.law)
    return [row for row in rows if tuple(row["asked"][key] for key in ("policy", "kernel", "law")) == wanted]


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a column for each load: nodes, and below GiB held on each."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, len(LOADS), sharey=True)
    for (nodes, held), (name, load) in zip(panels.T, LOADS.items(), strict=True):
        found = {policy: mine for policy in POLICIES if (mine := _found(rows, load, policy))}
        colours = [COLOURS[policy] for policy in found]
        counts = [mean(row["nodes"] or row["asked"]["most"] for row in mine) for mine in found.values()]
        beyond = [any(row["nodes"] is None for row in mine) for mine in found.values()]
        bars = nodes.barh(list(found), counts, color=colours)
        labels = [f"{'>' if over else ''}{count:g}" for count, over in zip(counts, beyond, strict=True)]
        nodes.bar_label(bars, labels, padding=3, fontsize=9)
        kept = [mean(row["kept_gib_per_node"] for row in mine) for mine in found.values()]
        bars = held.barh(list(found), kept, color=colours)
        held.bar_label(bars, [f"{each:.1f}" for each in kept], padding=3, fontsize=9)
        held.axvline(everything_gib(load), color="black", linestyle=":", linewidth=1)
        nodes.set_title(name, fontsize=10)
        nodes.set_xlabel("nodes needed")
        held.set_xlabel("adapter GiB kept a node (dotted: all)")
        nodes.margins(x=0.15)
        held.margins(x=0.15)
    panels[0][0].invert_yaxis()
    return figure


SUITE = Suite("nodes_needed", __doc__ or "", ask, {"nodes_needed": draw})

if __name__ == "__main__":
    main(SUITE)
