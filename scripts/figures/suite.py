"""The command line of a suite: simulate what is not known yet, keep the rows, draw them."""

# matplotlib's stubs are incomplete.
# pyright: reportUnknownMemberType=false

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from scripts.arguments import one_line
from scripts.bench.drawing import RESOLUTION_DPI
from scripts.figures.cluster_run import ClusterRun, Traces, ask, read_traces
from scripts.figures.rows import SuiteRows
from scripts.results import Row


@dataclass(frozen=True, slots=True)
class SuiteWork:
    """What a suite works with. `quick` asks for just enough to show that it works."""

    rows: SuiteRows
    traces: Traces
    quick: bool


@dataclass(frozen=True, slots=True)
class Suite:
    """`ask` fills the rows of `name`.jsonl; each of `pictures` draws NAME.png from all of them."""

    name: str
    about: str
    ask: Callable[[SuiteWork], None]
    pictures: Mapping[str, Callable[[Sequence[Row]], Figure]]


def ask_each(work: SuiteWork, runs: Sequence[ClusterRun]) -> None:
    """Ask for every run; a quick work asks for short ones of the first few."""
    chosen = [replace(run, seconds=8.0, rate=4.0, warm_s=4.0) for run in runs[:3]] if work.quick else runs
    for run in tqdm(chosen, unit="run"):
        ask(work.rows, run, work.traces)


def main(suite: Suite, arguments: Sequence[str] | None = None) -> None:
    """Run a suite from the command line."""
    parser = argparse.ArgumentParser(
        description=suite.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, help="folder of azure_llm_2023_{code,conv}.csv")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of rows and pictures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and drawn traces, to see it work")
    parser.add_argument(
        "--anew",
        metavar="POLICY,...",
        default="",
        help="ask again where another commit has answered for these policies",
    )
    parser.add_argument("--draw", action="store_true", help="only draw the rows that are there")
    options = parser.parse_args(arguments)
    if not (options.traces or options.quick or options.draw):
        parser.error("give --traces FOLDER, or --quick or --draw")
    with one_line(f"scripts.figures.{suite.name}"):
        rows = SuiteRows(options.out / f"{suite.name}.jsonl", options.anew.split(","))
        if not options.draw:
            traces = read_traces(None if options.quick else options.traces)
            suite.ask(SuiteWork(rows, traces, options.quick))
            rows.tidy()
        if not rows.all():
            raise ValueError(f"{options.out} has no rows of {suite.name}: give --traces or --quick first")
        for name, draw in suite.pictures.items():
            draw(rows.all()).savefig(options.out / f"{name}.png", dpi=RESOLUTION_DPI)
