"""Rank interference, live: what a request of rank 8 waits for when its neighbours' ranks grow.

    python -m scripts.bench_interference --model build/bench/100m --adapters build/bench/100m-adapters/index.json
        --profile scheduler/cluster/profiles/cpu_100m.json --out results/bench_interference.jsonl

Two companies: the request among five neighbours of the rank in question, and six requests of rank 8 with one
such neighbour; every sequence has an adapter of its own. Each is run with the engine's kernels, which take every
rank as it is, and with all ranks padded to the step's largest (scripts/bench/padded.py), in an order shuffled
anew each round. Time between tokens is a step in which all decode; time to first token one in which all prompts
are read. With a profile each row also has what its cost models say of exact, multi-rank and padded kernels.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from tqdm import tqdm

from engine.runner.base import Computation, StepExecutor
from lora.adapter import BASE, AdapterRef
from lora.segments import AdapterLease
from scheduler.cluster.cost.model import CostModel, Kernel, StepLoad
from scheduler.cluster.cost.profile import from_json
from scheduler.plan import StepPlan
from scripts.bench import live
from scripts.bench.cases import by_rank
from scripts.bench.live import Subject
from scripts.bench.padded import Padded
from scripts.bench.rehearsal import Case, Landings, Part, Rehearsal
from scripts.make_bench_models import RANKS

SMALL = min(RANKS)
NEIGHBOURS, SMALL_ONES = 5, 6
PROMPT_TOKENS = 32


class Switch:
    """StepExecutor that is one of several, by name."""

    def __init__(self, executors: Mapping[str, StepExecutor]) -> None:
        self.executors = executors
        self.current = next(iter(executors))

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """See StepExecutor."""
        return self.executors[self.current].launch(plan, lease)


@dataclass(frozen=True, slots=True)
class Trial:
    """One company with neighbours of one rank (0: the base), and the metric."""

    company: str
    rank: int
    metric: str
    case: Case


def trials(adapters: Sequence[AdapterRef]) -> Iterator[Trial]:
    """Every company, rank and metric."""
    refs = {0: [BASE] * NEIGHBOURS, **by_rank(adapters)}
    for rank, others in refs.items():
        others = others[::-1]  # of rank 8 the last are not among the small ones
        companies = {
            f"one of rank {SMALL}, {NEIGHBOURS} neighbours": [refs[SMALL][0], *others[:NEIGHBOURS]],
            f"{SMALL_ONES} of rank {SMALL}, one neighbour": [*refs[SMALL][:SMALL_ONES], others[0]],
        }
        for company, members in companies.items():
            parts = tuple(Part(ref, PROMPT_TOKENS) for ref in members)
            yield Trial(company, rank, "tbt", Case(parts))
            yield Trial(company, rank, "ttft", Case((), parts))


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each trial and kernel: seconds of every round."""
    landings, models = Landings(), cost_models(options.profile)
    switches: list[Switch] = []

    def around(executor: StepExecutor) -> StepExecutor:
        switches.append(Switch({"exact": executor, "padded": Padded(executor)}))
        return landings.around(switches[0])

    with ExitStack() as scratch:
        node = live.start(Subject(options.model, options.adapters, threads=options.threads), around, scratch)
        rehearsal = Rehearsal(node.engine, landings, options.seed)
        rehearsal.warm(node.adapters)
        planned = [(kernel, trial) for trial in trials(node.adapters) for kernel in switches[0].executors]
        seconds: dict[tuple[str, Trial], list[float]] = {each: [] for each in planned}
        loads: dict[Trial, StepLoad] = {}
        rng = Random(options.seed)
        order = [each for _ in range(options.rounds + 1) for each in rng.sample(planned, len(planned))]
        for kernel, trial in tqdm(order, unit="trial", desc="interference"):
            switches[0].current = kernel
            (row,) = rehearsal.measure(trial.case)
            seconds[kernel, trial].append(row.step_s)
            loads[trial] = row.load
    about = {
        "hardware": node.hardware,
        "base_model": node.base_model,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    return [
        {
            "company": trial.company,
            "neighbour_rank": trial.rank,
            "metric": trial.metric,
            "kernel": kernel,
            "seconds": [round(each, 6) for each in times[1:]],  # the first round made the padded copies
            "model_s": {model.kernel.value: round(model.step_s(loads[trial]), 6) for model in models},
            **about,
        }
        for (kernel, trial), times in seconds.items()
    ]


def cost_models(path: Path | None) -> list[CostModel]:
    """A profile's, one of each kernel kind; none without a profile."""
    if path is None:
        return []
    profile = from_json(path.read_text())
    return [profile.model(kernel) for kernel in Kernel]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Medians in milliseconds, a line per company, metric and kernel, a column per rank."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        seconds = row["seconds"]
        assert isinstance(seconds, list)
        name = str(row["company"]), str(row["metric"]), str(row["kernel"])
        lines.setdefault(name, []).append(f"{row['neighbour_rank']}: {1e3 * median(seconds):.1f}")
    return "\n".join(f"{' | '.join(name):52} {', '.join(cells)}" for name, cells in lines.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder or hub id")
    add("--adapters", type=Path, help="an index.json; synthetic ones without it")
    add("--threads", type=int, default=1, help="of torch on a CPU")
    add("--profile", type=Path, help="whose cost models are put beside")
    add("--rounds", type=int, default=7)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="JSONL to append to")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, append."""
    options = parse()
    rows = measure(options)
    print(table(rows))
    with options.out.open("a") as sink:
        for row in rows:
            print(json.dumps(row), file=sink)


if __name__ == "__main__":
    main()
