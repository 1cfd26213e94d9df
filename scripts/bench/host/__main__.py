"""Measure what the host does in a decode step besides computing: plan, lay out the batch, take the outputs, commit.

    python -m scripts.bench.host --out results/bench_host.jsonl

Sequences of 1,000 tokens, each under its own adapter, run in steady decode on an executor that answers at
once. A device waits for the host only where a step is shorter than this. The goal at 128 sequences is 0.3 ms.
Text, sockets and the event loop run on another thread and are left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from engine.runner.base import StepOutputs
from engine.runner.input_batch import InputBatchBuilder
from lora.adapter import AdapterRef
from scheduler.blocks import BlockPool
from scheduler.limits import StepLimits
from scheduler.plan import SliceOutput, StepPlan
from scheduler.request import Request, SamplingParams
from scheduler.step import StepScheduler
from scripts.arguments import count, one_line
from scripts.bench import machine
from scripts.results import Row, append_rows

PARTS = ("plan", "layout", "outputs", "commit")
PROMPT_TOKENS, BLOCK_SIZE, RANKS = 1000, 16, (8, 16, 32, 64, 128)
GOAL_US = 300

T = TypeVar("T")


@dataclass
class PartTimes:
    """Microseconds of each part, step by step."""

    us: dict[str, list[float]]

    def time(self, part: str, work: Callable[[], T]) -> T:
        """Do the work and record what it took."""
        start_s = time.perf_counter()
        result = work()
        self.us[part].append(1e6 * (time.perf_counter() - start_s))
        return result

    def row(self, sequences: int) -> Row:
        """Compute the medians, and the median and 95th percentile of their sum."""
        sums = [sum(parts) for parts in zip(*self.us.values(), strict=True)]
        return {
            "sequences": sequences,
            **{f"{part}_us": statistics.median(times) for part, times in self.us.items()},
            "step_us": statistics.median(sums),
            "step_p95_us": statistics.quantiles(sums, n=20)[-1],
            "goal_us": GOAL_US if sequences == 128 else None,
            "steps": len(sums),
        }


def measure(sequences: int, steps: int) -> Row:
    """Measure medians over `steps` steady steps of so many sequences."""
    scheduler, ready = _running(sequences)
    builder, times = InputBatchBuilder(BLOCK_SIZE), PartTimes({part: [] for part in PARTS})
    builder.build(_step(scheduler, ready))
    for _ in range(steps):
        plan = times.time("plan", lambda: scheduler.plan(0.0, ready))
        times.time("layout", lambda plan=plan: builder.build(plan))
        drawn = [7] * len(plan.slices)
        made = times.time("outputs", lambda drawn=drawn: StepOutputs(tuple(map(SliceOutput, drawn)), ()))
        times.time("commit", lambda plan=plan, made=made: scheduler.commit(plan, made.outputs))
    return times.row(sequences)


def _running(sequences: int) -> tuple[StepScheduler, frozenset[str]]:
    """Make a scheduler whose sequences have their prompts computed."""
    blocks = BlockPool(sequences * 256, BLOCK_SIZE)
    scheduler = StepScheduler(StepLimits(sequences, 8192, 4096), blocks)
    refs = [
        AdapterRef(f"{i:064x}", f"adapter-{i}", RANKS[i % len(RANKS)], ("q_proj",), 1)
        for i in range(sequences)
    ]
    ready = frozenset(ref.digest for ref in refs)
    for i, ref in enumerate(refs):
        params = SamplingParams(max_tokens=None, seed=i)
        prompt = tuple(range(i, i + PROMPT_TOKENS + i % BLOCK_SIZE))  # so that blocks fill at different steps
        scheduler.add(Request(f"cmpl-{i:024d}", prompt, ref, params, (2,), 0.0))
    while True:
        plan = _step(scheduler, ready)
        if plan.num_tokens == len(plan.slices) == sequences:
            return scheduler, ready


def _step(scheduler: StepScheduler, ready: frozenset[str]) -> StepPlan:
    plan = scheduler.plan(0.0, ready)
    scheduler.commit(plan, [SliceOutput(7 if part.samples else None) for part in plan.slices])
    return plan


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with --out write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=count, nargs="+", default=[32, 128, 256])
    parser.add_argument("--steps", type=count, default=1000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    rows = [{"machine": machine.describe(), **measure(count, given.steps)} for count in given.sequences]
    for row in rows:
        parts = "  ".join(f"{part} {row[f'{part}_us']:6.1f}" for part in PARTS)
        print(
            f"{row['sequences']:4} sequences  {parts}  step {row['step_us']:6.1f} us (P95 {row['step_p95_us']:.1f})"
        )
    if given.out:
        given.out.unlink(missing_ok=True)
        append_rows(given.out, rows)


if __name__ == "__main__":
    with one_line("scripts.bench.host"):
        main()
