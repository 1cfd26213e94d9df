"""What the host does in a decode step besides computing: planning, laying out, and committing what was drawn.

    python -m scripts.bench_host --out results/bench_host.jsonl

Sequences of 1,000 tokens, each under its own adapter, run in steady decode on an executor that draws at once. A device
that computes while the host decides waits for the host only where a step is shorter than this; the goal at 128
sequences is 0.3 ms. Text, sockets and the event loop are the front desk's, on another thread, and not in it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from scripts.bench import machine

PARTS = ("plan", "layout", "outputs", "commit")
PROMPT_TOKENS, BLOCK_SIZE, RANKS = 1000, 16, (8, 16, 32, 64, 128)
GOAL_US = 300

T = TypeVar("T")


@dataclass
class Stopwatch:
    """Microseconds of each part, step by step."""

    us: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def time(self, part: str, work: Callable[[], T]) -> T:
        """Do the work, and note what it took."""
        start_s = time.perf_counter()
        result = work()
        self.us[part].append(1e6 * (time.perf_counter() - start_s))
        return result

    def row(self, sequences: int) -> dict[str, object]:
        """The medians, and the median and 95th percentile of their sum."""
        sums = [sum(parts) for parts in zip(*self.us.values(), strict=True)]
        return {
            "sequences": sequences,
            **{f"{part}_us": statistics.median(times) for part, times in self.us.items()},
            "step_us": statistics.median(sums),
            "step_p95_us": statistics.quantiles(sums, n=20)[-1],
            "goal_us": GOAL_US if sequences == 128 else None,
            "steps": len(sums),
        }


def measure(sequences: int, steps: int) -> dict[str, object]:
    """A row of medians over `steps` steady steps of as many sequences."""
    scheduler, ready = _running(sequences)
    builder, watch = InputBatchBuilder(BLOCK_SIZE), Stopwatch()
    builder.build(_step(scheduler, ready))
    for _ in range(steps):
        plan = watch.time("plan", lambda: scheduler.plan(0.0, ready))
        watch.time("layout", lambda plan=plan: builder.build(plan))
        drawn = [7] * len(plan.slices)
        told = watch.time("outputs", lambda drawn=drawn: StepOutputs(tuple(map(SliceOutput, drawn)), ()))
        watch.time("commit", lambda plan=plan, told=told: scheduler.commit(plan, told.outputs))
    return watch.row(sequences)


def _running(sequences: int) -> tuple[StepScheduler, frozenset[str]]:
    """A scheduler whose sequences have their prompts computed."""
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
    """Measure and print, and with --out keep the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    rows = [{"machine": machine.describe(), **measure(count, given.steps)} for count in given.sequences]
    for row in rows:
        parts = "  ".join(f"{part} {row[f'{part}_us']:6.1f}" for part in PARTS)
        print(
            f"{row['sequences']:4} sequences  {parts}  step {row['step_us']:6.1f} us (P95 {row['step_p95_us']:.1f})"
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
