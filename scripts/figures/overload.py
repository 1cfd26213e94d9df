"""Show what an overload costs, while it lasts and after it.

    python -m scripts.figures.overload --traces FOLDER

Four nodes; conversations at about what they carry, at twice and four times that, and 15 s of three times that.
Seeds are some that no policy was tuned on.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from scripts.figures.cluster_run import ClusterRun
from scripts.figures.suite import Suite, SuiteWork, ask_each, main
from scripts.results import Row

POLICIES = (
    "ours", "ours-placement-only", "ours-routing-only", "paper", "paper-our-routing", "toppings", "ours-no-admission"
)  # fmt: skip
CURVES = ("steady", "steady:2", "steady:4", "step:3:35:15")
SEEDS = range(10, 13)
RATE = 12.0
SECONDS = 80.0
WINDOW_S = 5


def runs() -> list[ClusterRun]:
    """List every combination, seed by seed."""
    return [
        ClusterRun(policy, curve=curve, rate=RATE, seconds=SECONDS, seed=seed)
        for seed in SEEDS
        for curve in CURVES
        for policy in POLICIES
    ]


def ask_all(work: SuiteWork) -> None:
    """Ask for all runs."""
    ask_each(work, runs())


def draw(rows: Sequence[Row]) -> Figure:
    """Draw goodput by policy and curve, a dot a seed; and the part in time around the 15 s of overload."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    bars, line = figure.subplots(1, 2)
    steady = [curve for curve in CURVES if curve.startswith("steady")]
    for at, policy in enumerate(POLICIES):
        for column, curve in enumerate(steady):
            found = [row["goodput"] for row in rows if _is(row, policy, curve)]
            if found:
                x = column + (at - len(POLICIES) / 2) * 0.11
                bars.bar(x, fmean(found), 0.1, color=f"C{at}", label=policy if column == 0 else None)
                bars.plot([x] * len(found), found, "k.", markersize=3)
        parts = [_windows(row["in_time_by_s"]) for row in rows if _is(row, policy, "step:3:35:15")]
        if parts:
            mean = np.nanmean(np.array(parts), axis=0)
            line.plot(np.arange(len(mean)) * WINDOW_S, mean, color=f"C{at}")
    bars.set_xticks(range(len(steady)), [curve.replace("steady:", "× ") for curve in steady])
    bars.set_ylabel("requests/s in time")
    bars.legend(fontsize="small")
    line.axvspan(35, 50, color="0.9")
    line.set(xlabel="seconds", ylabel="part in time")
    return figure


def _is(row: Row, policy: str, curve: str) -> bool:
    return (row["asked"]["policy"], row["asked"]["curve"]) == (policy, curve)


def _windows(parts: Sequence[float | None]) -> list[float]:
    """Average by window; seconds in which nothing came do not count."""
    whole = len(parts) // WINDOW_S * WINDOW_S
    windows = [parts[at : at + WINDOW_S] for at in range(0, whole, WINDOW_S)]
    known = [[part for part in window if part is not None] for window in windows]
    return [fmean(window) if window else float("nan") for window in known]


SUITE = Suite("overload", __doc__ or "", ask_all, {"overload": draw})

if __name__ == "__main__":
    main(SUITE)
