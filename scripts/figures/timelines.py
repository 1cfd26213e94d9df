"""Show what happens over time when the workload changes: a hot rank that moves, a flash crowd, a day.

    python -m scripts.figures.timelines --traces FOLDER

P95 of the time to first token by time of arrival, and bytes moved and bytes held by then; padded kernels,
four nodes.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from scheduler.sim.replay import Replay
from scripts.figures.cluster_run import GIB, SLO, ClusterRun, everything_gib, simulate
from scripts.figures.policies import COLOURS
from scripts.figures.suite import Suite, SuiteWork, main
from scripts.results import Row

POLICIES = ("ours", "ours-no-replacement", "paper", "slora-random", "toppings")
CHANGES = {
    "hot rank moves from 8 to 128": ClusterRun("", ranks="shifting", rate=15.0, seconds=150.0),
    "flash crowd, 40 % on one cold adapter": ClusterRun("", law="flash:0.3", rate=15.0, seconds=150.0),
    "a day: every adapter swings": ClusterRun("", law="diurnal:0.3", rate=15.0, seconds=150.0),
}
WINDOW_S = 10.0


def answer(done: Replay, run: ClusterRun) -> Row:
    """List by window of arrival: P95 of TTFT in seconds, and GiB moved, GiB kept a node and pulls by its end."""
    starts = np.arange(0.0, run.seconds, WINDOW_S)
    at = np.array([record.arrival.call.arrival_s - run.lead_s for record in done.records if record.served])
    ttft = np.array([record.ttft_s for record in done.records if record.served])
    ends = [done.samples[min(len(done.samples), int(run.lead_s + start + WINDOW_S)) - 1] for start in starts]
    inside = [ttft[(at >= start) & (at < start + WINDOW_S)] for start in starts]
    return {
        "from_s": starts.tolist(),
        "ttft_p95_s": [round(float(np.percentile(each, 95)), 4) if len(each) else None for each in inside],
        "moved_gib": [round(sample.moved_bytes / GIB, 3) for sample in ends],
        "kept_gib_per_node": [round(sample.kept_bytes / GIB / run.nodes, 3) for sample in ends],
        "pulls": [sample.pulls for sample in ends],
        "refused": done.outcome.refused,
        "everything_gib": round(everything_gib(run), 3),
    }


def ask(work: SuiteWork) -> None:
    """Ask for a run for each change and policy."""
    runs = [replace(run, policy=policy) for run in CHANGES.values() for policy in POLICIES]
    if work.quick:
        runs = [replace(run, seconds=20.0, rate=4.0, warm_s=5.0, adapters=10) for run in runs[:2]]
    for run in tqdm(runs, unit="run"):
        work.rows.ask(asdict(run), lambda run=run: answer(simulate(run, work.traces), run))


def _is(row: Row, policy: str, change: ClusterRun) -> bool:
    asked = row["asked"]
    return (asked["policy"], asked["ranks"], asked["law"]) == (policy, change.ranks, change.law)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a column for each change: latency, bytes moved, bytes held."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(3, len(CHANGES), sharex="col", sharey="row")
    colours = {**COLOURS, "ours-no-replacement": "C9"}
    for column, (name, change) in enumerate(CHANGES.items()):
        ttft, moved, kept = panels[:, column]
        for policy in POLICIES:
            for row in (row for row in rows if _is(row, policy, change)):
                middles = [start + WINDOW_S / 2 for start in row["from_s"]]
                ends = [start + WINDOW_S for start in row["from_s"]]
                style = {"color": colours[policy], "lw": 2.4 if policy == "ours" else 1.3, "label": policy}
                ttft.plot(middles, row["ttft_p95_s"], **style)
                moved.plot(ends, row["moved_gib"], **style)
                kept.plot(ends, row["kept_gib_per_node"], **style)
                kept.axhline(row["everything_gib"], color="black", linestyle=":", linewidth=1)
        ttft.axhline(SLO.ttft_s, color="black", linestyle=":", linewidth=1)
        ttft.set_yscale("log")
        ttft.set_title(name, fontsize=10)
        kept.set_xlabel("seconds")
        kept.set_ylim(bottom=0)
    panels[0][0].set_ylabel("P95 time to first token, s")
    panels[1][0].set_ylabel("moved so far, GiB")
    panels[2][0].set_ylabel("kept a node, GiB (dotted: all)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(POLICIES))
    return figure


SUITE = Suite("timelines", __doc__ or "", ask, {"timelines": draw})

if __name__ == "__main__":
    main(SUITE)
