"""Draw the transport benchmark: speed by size, a panel per kind, each transport beside the raw path it is made of.

    python -m scripts.bench.transport.draw results/transport.jsonl --out results/transport.png

The faster paths that bound the raw one are dashed. A line is the median of all rounds in the file, its band
the fastest and the slowest.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.drawing import draw_file
from scripts.results import read_rows

PANELS = {
    "in one process": ("memcpy", "loopback"),
    "on one host": ("process_vm_readv", "ucx"),
    "plain TCP, loopback": ("socket", "plain stream"),
    "TLS 1.3, loopback": ("TLS socket", "TLS stream"),
}
LIMITS = {
    "process_vm_readv": ("memcpy",),
    "socket": ("memcpy", "process_vm_readv"),
    "TLS socket": ("memcpy", "process_vm_readv", "socket"),
}
PANEL_INCHES = (3.6, 3.2)

Speeds = Mapping[str, Mapping[int, Sequence[float]]]


def read(path: Path) -> Speeds:
    """Read the GB/s of every move in the file, by path and size."""
    speeds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path):
        if row["what"] == "move":
            speeds[row["path"]][row["nbytes"]].append(row["nbytes"] / row["s"] / 1e9)
    return speeds


def draw_panel(axes: Axes, speeds: Speeds, raw: str, ours: str) -> None:
    """Draw the raw path in grey, the transport in blue, what bounds them dashed."""
    for path, colour in ((raw, "grey"), (ours, "C0")):
        sizes = sorted(speeds[path])
        axes.plot(sizes, [statistics.median(speeds[path][size]) for size in sizes], color=colour, label=path)
        low, high = ([pick(speeds[path][size]) for size in sizes] for pick in (min, max))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    for path, colour in zip(LIMITS.get(raw, ()), ("C1", "C2", "C3"), strict=False):
        sizes = sorted(speeds[path])
        medians = [statistics.median(speeds[path][size]) for size in sizes]
        axes.plot(sizes, medians, color=colour, linestyle="--", linewidth=1, label=path)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes")
    axes.legend(fontsize=8)


def draw(speeds: Speeds) -> Figure:
    """Draw the whole figure."""
    figure = Figure(figsize=(PANEL_INCHES[0] * len(PANELS), PANEL_INCHES[1]), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (title, (raw, ours)) in zip(panels, PANELS.items(), strict=True):
        draw_panel(axes, speeds, raw, ours)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("GB/s, lease included")
    return figure


if __name__ == "__main__":
    draw_file(__doc__, lambda path: draw(read(path)))
