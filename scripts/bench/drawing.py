"""Draw a benchmark's figure: the command line that all of them share, and axes over adapter ranks."""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.arguments import one_line
from scripts.results import read_rows

RESOLUTION_DPI = 150


def draw_file(
    about: str | None, draw: Callable[[Path], Figure], arguments: Sequence[str] | None = None
) -> None:
    """Read the results file that the command line names and write its picture."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSONL that the benchmark wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(arguments)
    with one_line("scripts.bench, drawing"):
        if not read_rows(options.results):
            raise ValueError(f"{options.results} has no rows: run the benchmark first")
        draw(options.results).savefig(options.out, dpi=RESOLUTION_DPI)
    print(options.out)


def label_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    """Label places 0, 1, … with the ranks; rank 0 is the base model."""
    axes.set_xticks(range(len(ranks)), [str(rank) if rank else "base" for rank in ranks])
