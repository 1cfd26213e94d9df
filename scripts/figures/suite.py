"""A suite's command line: ask what is not known yet, keep the rows, draw them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from scripts.figures.rows import Row, Rows
from scripts.figures.stage import Traces, read_traces


@dataclass(frozen=True, slots=True)
class Work:
    """What a suite works with. `quick` asks for as little as shows that it works."""

    rows: Rows
    traces: Traces
    quick: bool


@dataclass(frozen=True, slots=True)
class Suite:
    """`ask` fills the rows of `name`.jsonl, `draw` makes the picture of `figure`.png from all of them."""

    name: str
    figure: str
    about: str
    ask: Callable[[Work], None]
    draw: Callable[[Sequence[Row]], Figure]


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
    rows = Rows(options.out / f"{suite.name}.jsonl", options.anew.split(","))
    if not options.draw:
        suite.ask(Work(rows, read_traces(None if options.quick else options.traces), options.quick))
        rows.tidy()
    suite.draw(rows.all()).savefig(options.out / f"{suite.figure}.png", dpi=150)
