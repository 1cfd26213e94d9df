"""Draw the tier benchmark: time to first token over rank, a line per tier.

    python scripts/figures/tiers.py results/bench_tiers.jsonl --out results/bench_tiers.png

A line is the median of the latest run in the file, its band the fastest and the slowest request.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {"device": "C2", "host": "C0", "disk": "C1", "peer": "C3"}

Times = Mapping[str, Mapping[int, Sequence[float]]]


def read_last_run(path: Path) -> Times:
    """Milliseconds to the first token of every request of the latest run, by tier and rank."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["started"] == rows[-1]["started"]:
            times[row["tier"]][row["rank"]].append(row["ttft_ms"])
    return times


def draw(times: Times) -> Figure:
    """The whole figure."""
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.subplots()
    for tier, colour in COLOURS.items():
        ranks = sorted(times[tier])
        medians = [statistics.median(times[tier][rank]) for rank in ranks]
        low, high = ([pick(times[tier][rank]) for rank in ranks] for pick in (min, max))
        axes.plot(ranks, medians, marker="o", color=colour, label=tier)
        axes.fill_between(ranks, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("time to first token, ms")
    axes.legend()
    return figure


def main() -> None:
    """Read a results file, write a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw(read_last_run(options.results)).savefig(options.out, dpi=160)


if __name__ == "__main__":
    main()
