"""Throughput under the SLO by policy, with five seeds and their spread, under padded and exact kernels.

    python -m scripts.figures.policies_compared --traces FOLDER

Its rows are those of policies_by_rate. A bar is the mean over the seeds of the highest rate of the ladder at which P95
of both times is within the SLO (0: not even at the lowest), a dot a seed; beside it the mean and the number of seeds.
"""

from collections.abc import Sequence
from math import ceil
from statistics import mean

from matplotlib.figure import Figure

from scripts.figures.policies import POLICIES, ask_all, present, throughputs
from scripts.figures.policies_by_rate import COLOURS
from scripts.figures.rows import Row
from scripts.figures.suite import Suite, main

COLUMNS = 3


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each workload."""
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


SUITE = Suite("policies", "policies_compared", __doc__ or "", ask_all, draw)

if __name__ == "__main__":
    main(SUITE)
