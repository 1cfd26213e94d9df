"""P95 of the time to first token and between tokens over the request rate, policies side by side.

python -m scripts.figures.policies_by_rate --traces FOLDER
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from scripts.figures.policies import POLICIES, ask_all, of, present
from scripts.figures.rows import Row
from scripts.figures.stage import SLO
from scripts.figures.suite import Suite, main

COLOURS = {policy: f"C{at}" for at, policy in enumerate(POLICIES)}


def draw_panel(axes: Axes, runs: dict[str, list[Row]], metric: str, bound_s: float) -> None:
    """A line for each policy, and the bound."""
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


def draw(rows: Sequence[Row]) -> Figure:
    """A row for each workload that was climbed, else for each that there is."""
    loads = [load for load in present(rows) if load.climbed]
    figure = Figure(figsize=(10, 3.3 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), 2, squeeze=False)
    for (ttft, tbt), load in zip(panels, loads, strict=True):
        runs = {policy: of(rows, load, policy, 0) for policy in POLICIES}
        draw_panel(ttft, runs, "ttft_p95_s", SLO.ttft_s)
        draw_panel(tbt, runs, "tbt_p95_s", SLO.tbt_s)
        ttft.set_ylabel("P95 time to first token, s")
        tbt.set_ylabel("P95 time between tokens, s")
        ttft.set_title(load.name, fontsize=10, loc="left")
    panels[0][1].legend(fontsize=7)
    return figure


SUITE = Suite("policies", "policies_by_rate", __doc__ or "", ask_all, draw)

if __name__ == "__main__":
    main(SUITE)
