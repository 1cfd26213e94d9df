"""Profile a node: time steps of a live engine, fit the cost model, say how far off it is, write it as JSON.

    python -m scripts.profile_node measure --model build/bench/100m --rows results/profile_cpu_100m.jsonl
    python -m scripts.profile_node fit --rows results/profile_cpu_100m.jsonl --profile cpu_100m.json

The engine is assembled in this process with synthetic adapters of ranks 8 to 128, or those of --adapters. So
the scheduler, the adapter store and the detokenizer are in what is timed; HTTP is not. Cases come in an order
shuffled by the seed, anew in every round; a kind of step has the mean of its times. Rows are appended, so a
run may be followed by others. The held-out error is of five folds: each fifth of the kinds is predicted by a
fit to the other four fifths.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from random import Random

from tqdm import tqdm

from engine.errors import EngineError
from model.checkpoint_files import CheckpointError
from model.config import UnsupportedModel
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Lengths, Limits, Profile, Slo, to_json
from scripts.arguments import positive, seconds
from scripts.bench.llama import RANKS
from scripts.profile_node.live_engine import EngineSpec, add_engine_options, start_engine
from scripts.profile_node.step_cases import CaseBounds, planned
from scripts.profile_node.step_rows import FittedModel, fitted, from_row, node_row, to_row
from scripts.profile_node.step_timer import StepCase, StepEnds, StepTimer
from scripts.results import Row, append_rows, read_rows


def rounds(each: Sequence[StepCase], options: argparse.Namespace) -> Iterator[StepCase]:
    """Yield all cases, shuffled, again and again, until the rounds or the seconds are over."""
    rng, deadline_s = Random(f"order/{options.seed}"), time.monotonic() + options.seconds
    order = chain.from_iterable(rng.sample(each, len(each)) for _ in range(options.rounds))
    for case in tqdm(order, total=options.rounds * len(each), unit="case", desc="profile"):
        if time.monotonic() > deadline_s:
            return
        yield case


def measure(options: argparse.Namespace) -> None:
    """Assemble an engine, time its steps, append the rows."""
    spec = EngineSpec(options.model, options.adapters, options.device, options.dtype, options.threads)
    with ExitStack() as scratch:
        ends = StepEnds()
        node = start_engine(spec, ends.around, scratch)
        append_rows(options.rows, [node_row(node)])
        timer = StepTimer(node.engine, ends, options.seed)
        timer.warm(node.adapters)
        bounds = CaseBounds(options.sequences, options.prompt_tokens)
        for case in rounds(planned(node.adapters, bounds, options.draws), options):
            append_rows(options.rows, map(to_row, timer.measure(case)))


def to_profile(found: FittedModel, node: Row, options: argparse.Namespace) -> Profile:
    """Make the profile; kernels that pad are taken to cost what ours do at the ranks to which they pad."""
    error = found.error
    note = (
        f"{found.steps} timed steps of {found.kinds} kinds; held-out error (five folds): median "
        f"{error.median:.1%}, mean {error.mean:.1%}, P95 {error.p95:.1%}, worst {error.worst:.1%}. The exact "
        "kernels were measured; the others are taken to cost the same at the ranks to which they pad."
    )
    return Profile(
        hardware=node["hardware"],
        base_model=node["base_model"],
        provenance="measured",
        note=note,
        models=tuple(found.model.under(kernel, max(RANKS)) for kernel in Kernel),
        slo=Slo(options.ttft_s, options.tbt_s),
        lengths=Lengths(options.mean_prompt_tokens, options.mean_output_tokens),
        limits=Limits(node["step_prompt_tokens"], node["kv_tokens"]),
    )


def report(found: FittedModel, profile: Profile) -> None:
    """Print what was found, for people."""
    model, error, slo = found.model, found.error, profile.slo
    print(f"{found.steps} timed steps of {found.kinds} kinds on {profile.hardware}; microseconds:")
    for name, value in asdict(model).items():
        if name.endswith("_s"):
            print(f"  {name.removesuffix('_s'):16} {1e6 * value:12.4f}")
    print(f"  knee at {model.knee_rows:.0f} rows")
    print(
        f"held-out error (five folds): median {error.median:.1%}, mean {error.mean:.1%}, "
        f"P95 {error.p95:.1%}, worst {error.worst:.1%}"
    )
    points = profile.operating_points(Kernel.EXACT, RANKS)
    print(f"operating points, tokens/s of one rank within TTFT {slo.ttft_s} s and TBT {slo.tbt_s} s:")
    print("  " + ", ".join(f"rank {rank}: {points.at(rank):.0f}" for rank in RANKS))


def fit(options: argparse.Namespace) -> None:
    """Fit the rows, say how well, write the profile."""
    rows = read_rows(options.rows)
    node = next((row for row in reversed(rows) if row["what"] == "node"), None)
    if node is None:
        raise ValueError(f"--rows {options.rows} has no row of a node: give what `measure` wrote")
    found = fitted([from_row(row) for row in rows if row["what"] == "step"])
    profile = to_profile(found, node, options)
    report(found, profile)
    options.profile.write_text(to_json(profile))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("measure", help="time steps, append rows")
    timing.set_defaults(run=measure)
    add_engine_options(timing)
    timing.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    timing.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    timing.add_argument("--sequences", type=int, default=32, help="that decode in a step, at most")
    timing.add_argument("--prompt-tokens", type=int, default=512, help="of one prompt, at most")
    timing.add_argument("--draws", type=int, default=60, help="mixed cases beside the grid")
    timing.add_argument("--rounds", type=int, default=3)
    timing.add_argument("--seconds", type=seconds, default=600.0, help="after which no case is begun")
    timing.add_argument("--seed", type=int, default=0, help="of the order, and of the prompts that are read")
    fitting = commands.add_parser("fit", help="rows to profile")
    fitting.set_defaults(run=fit)
    fitting.add_argument("--profile", type=Path, required=True, help="JSON to write")
    fitting.add_argument("--ttft-s", type=positive, default=2.0)
    fitting.add_argument("--tbt-s", type=positive, default=0.2)
    fitting.add_argument("--mean-prompt-tokens", type=positive, default=128.0)
    fitting.add_argument("--mean-output-tokens", type=positive, default=32.0)
    for command in (timing, fitting):
        command.add_argument("--rows", type=Path, required=True, help="JSONL")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure or fit."""
    options = parse()
    try:
        options.run(options)
    except (EngineError, CheckpointError, UnsupportedModel, OSError, ValueError) as error:
        sys.exit(f"python -m scripts.profile_node: {error}")


if __name__ == "__main__":
    main()
