"""Draw the tier benchmark: time to first token over rank, a line per tier, beside what the machine would allow.

    python -m scripts.bench.tiers.draw results/bench_tiers.jsonl --out results/bench_tiers.png

It draws the model of the latest run in the file. A line is the median of all its rows, a band reaches from
the first to the third quartile. Grey is the request to the base model. Dotted is a tier's limit: the same
adapter when it is resident, and its bytes at the best rate that was measured for the tier's way of moving
them.
"""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.drawing import draw_file
from scripts.results import read_rows

COLOURS = {"device": "C2", "host": "C0", "disk": "C1", "ucx": "C4", "stream": "C3"}
PATHS = {"host": "memcpy", "disk": "memcpy", "ucx": "process_vm_readv", "stream": "socket"}
NAMES = {"ucx": "peer, UCX", "stream": "peer, stream"}


@dataclass(frozen=True, slots=True)
class TierTimes:
    """One model's rows: milliseconds by tier and rank and of the base model, adapters' sizes, and best rates."""

    times: Mapping[str, Mapping[int, Sequence[float]]]
    base: Sequence[float]
    nbytes: Mapping[int, int]
    rates: Mapping[str, float]

    def median_ms(self, tier: str, rank: int) -> float:
        """Take the median of a tier at a rank."""
        return statistics.median(self.times[tier][rank])

    def limit_ms(self, tier: str, rank: int) -> float:
        """Add the bytes at the best rate to the time of a resident adapter."""
        return self.median_ms("device", rank) + 1e3 * self.nbytes[rank] / self.rates[PATHS[tier]]


def read(path: Path, size: str) -> TierTimes:
    """Read all rows of a model."""
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    rates: dict[str, float] = defaultdict(float)
    base: list[float] = []
    nbytes: dict[int, int] = {}
    for row in read_rows(path):
        if row["size"] != size:
            continue
        if "path" in row:
            rates[row["path"]] = max(rates[row["path"]], row["bytes_per_s"])
            continue
        times[row["tier"]][row["rank"]].append(row["ttft_ms"])
        base.append(row["base_ms"])
        nbytes[row["rank"]] = row["nbytes"]
    return TierTimes(times, base, nbytes, rates)


def draw(results: TierTimes) -> Figure:
    """Draw the whole figure."""
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    for tier in COLOURS:
        _draw_tier(axes, results, tier)
    axes.axhline(statistics.median(results.base), color="0.6", linewidth=1, label="base model")
    axes.plot([], [], color="0.3", linestyle=":", label="limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        sorted(results.nbytes), [f"{r}\n{n / 1e6:.0f} MB" for r, n in sorted(results.nbytes.items())]
    )
    axes.set_xlabel("rank")
    axes.set_ylabel("time to first token, ms")
    axes.legend(fontsize="small")
    return figure


def _draw_tier(axes: Axes, results: TierTimes, tier: str) -> None:
    times, colour = results.times[tier], COLOURS[tier]
    ranks = sorted(times)
    quartiles = [statistics.quantiles(times[rank], n=4, method="inclusive") for rank in ranks]
    axes.plot(ranks, [q[1] for q in quartiles], marker="o", color=colour, label=NAMES.get(tier, tier))
    axes.fill_between(
        ranks, [q[0] for q in quartiles], [q[2] for q in quartiles], color=colour, alpha=0.15, lw=0
    )
    if tier in PATHS:
        axes.plot(ranks, [results.limit_ms(tier, rank) for rank in ranks], color=colour, linestyle=":", lw=1)


if __name__ == "__main__":
    draw_file(__doc__, lambda path: draw(read(path, read_rows(path)[-1]["size"])))
