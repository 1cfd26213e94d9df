"""Measure rank interference: what a request of rank 8 waits for when its neighbours' ranks grow.

    python -m scripts.bench.interference --model build/bench/100m --adapters build/bench/100m-adapters/index.json
        --profile scheduler/cluster/profiles/cpu_100m.json --out results/bench_interference.jsonl

There are two batches: the request among five neighbours of the rank in question, and six requests of rank 8
with one such neighbour. Every sequence has an adapter of its own. Each batch is run with the engine's
kernels, which take every rank as it is, and with all ranks padded to the step's largest. The order is
shuffled anew each round. Time between tokens is a step in which all decode; time to first token one in which all
prompts are read. With a profile each row also has what its cost models predict for exact, multi-rank and
padded kernels.
"""

import argparse
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
from scripts.arguments import count, one_line
from scripts.bench.interference.padded import PaddedExecutor
from scripts.bench.llama import RANKS
from scripts.profile_node.live_engine import EngineSpec, add_engine_options, start_engine
from scripts.profile_node.step_cases import by_rank
from scripts.profile_node.step_timer import CaseSequence, StepCase, StepEnds, StepTimer
from scripts.results import Row, append_rows

SMALL = min(RANKS)
NEIGHBOURS, SMALL_ONES = 5, 6
PROMPT_TOKENS = 32


class SwitchedExecutor:
    """StepExecutor that is one of several, by name."""

    def __init__(self, executors: Mapping[str, StepExecutor]) -> None:
        self.executors = executors
        self.current = next(iter(executors))

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """See StepExecutor."""
        return self.executors[self.current].launch(plan, lease)


@dataclass(frozen=True, slots=True)
class InterferenceTrial:
    """One batch with neighbours of one rank (0: the base), and the metric."""

    batch: str
    rank: int
    metric: str
    case: StepCase


def trials(adapters: Sequence[AdapterRef]) -> Iterator[InterferenceTrial]:
    """Yield every batch, rank and metric."""
    refs = {0: [BASE] * NEIGHBOURS, **by_rank(adapters)}
    for rank, others in refs.items():
        others = others[::-1]  # of rank 8 the last are not among the small ones
        batches = {
            f"one of rank {SMALL}, {NEIGHBOURS} neighbours": [refs[SMALL][0], *others[:NEIGHBOURS]],
            f"{SMALL_ONES} of rank {SMALL}, one neighbour": [*refs[SMALL][:SMALL_ONES], others[0]],
        }
        for batch, members in batches.items():
            parts = tuple(CaseSequence(ref, PROMPT_TOKENS) for ref in members)
            yield InterferenceTrial(batch, rank, "tbt", StepCase(parts))
            yield InterferenceTrial(batch, rank, "ttft", StepCase((), parts))


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure every trial under every kernel; a row has the seconds of every round."""
    ends, models = StepEnds(), cost_models(options.profile)
    switches: list[SwitchedExecutor] = []

    def around(executor: StepExecutor) -> StepExecutor:
        switches.append(SwitchedExecutor({"exact": executor, "padded": PaddedExecutor(executor)}))
        return ends.around(switches[0])

    with ExitStack() as scratch:
        spec = EngineSpec(options.model, options.adapters, threads=options.threads)
        node = start_engine(spec, around, scratch)
        timer = StepTimer(node.engine, ends, options.seed)
        timer.warm(node.adapters)
        planned = [(kernel, trial) for trial in trials(node.adapters) for kernel in switches[0].executors]
        seconds: dict[tuple[str, InterferenceTrial], list[float]] = {each: [] for each in planned}
        loads: dict[InterferenceTrial, StepLoad] = {}
        rng = Random(options.seed)
        order = [each for _ in range(options.rounds + 1) for each in rng.sample(planned, len(planned))]
        for kernel, trial in tqdm(order, unit="trial", desc="interference"):
            switches[0].current = kernel
            (row,) = timer.measure(trial.case)
            seconds[kernel, trial].append(row.step_s)
            loads[trial] = row.load
    about = {
        "hardware": node.hardware,
        "base_model": node.base_model,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    return [
        {
            "company": trial.batch,
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
    """Read a profile's cost models, one for each kind of kernel; none without a profile."""
    if path is None:
        return []
    profile = from_json(path.read_text())
    return [profile.model(kernel) for kernel in Kernel]


def table(rows: Sequence[Row]) -> str:
    """Write medians in milliseconds, a line per batch, metric and kernel, a column per rank."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        name = str(row["company"]), str(row["metric"]), str(row["kernel"])
        lines.setdefault(name, []).append(f"{row['neighbour_rank']}: {1e3 * median(row['seconds']):.1f}")
    return "\n".join(f"{' | '.join(name):52} {', '.join(cells)}" for name, cells in lines.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_engine_options(parser)
    add("--profile", type=Path, help="whose cost models are put beside")
    add("--rounds", type=count, default=7)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="JSONL to append to")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, append."""
    options = parse()
    rows = measure(options)
    print(table(rows))
    append_rows(options.out, rows)


if __name__ == "__main__":
    with one_line("scripts.bench.interference"):
        main()
