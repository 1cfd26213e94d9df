"""Compare placements on live nodes under shifting popularity, beside what the simulator foretells.

    python -m scripts.bench.placement --out results/placement.jsonl
    python -m scripts.bench.placement --policies ours,toppings,slora-random --rounds 3 --rate 3

It profiles a node, then starts a cluster of the embedded model for each policy in turn, in float32, again for each
round. One node has the adapters' folder; the others pull from peers. The most popular adapters change at once, three
times in a run. A row has the time to the first token, what nodes held and what they pulled; and the same of a simulated
run that got the same requests, adapters and profile. Nodes share this machine's cores, which the simulator is not told.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.demo.embedded import DEMO_BASE
from model.checkpoint_files import read_config
from scheduler.cluster.cost.profile import Slo, from_json
from scheduler.sim.replay import Replay
from scheduler.sim.workload.popularity import ZipfLaw
from scheduler.sim.workload.trace import poisson
from scripts.arguments import count, one_line, positive
from scripts.bench import machine
from scripts.bench.placement.forecast import NodeMemory, forecast
from scripts.bench.placement.live_run import LiveFigures, LiveRun
from scripts.bench.placement.turning import Turning
from scripts.chaos.adapter_copies import plan_copies, write_copies
from scripts.chaos.cluster_processes import ClusterPlan
from scripts.chaos.questions import Answers, Asked, draw_questions
from scripts.results import Row, append_rows

_SLO = Slo(ttft_s=5.0, tbt_s=1.0)
_PROMPT_TOKENS = 24  # of a question in the chat template, about
_ANSWER_TOKENS = 96
_WORDS = 4
_TURNS = 3
_KV_BYTES = 64 << 20
_FLOAT_BYTES = 4
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all runs have in common."""

    nodes: int
    adapters: Path
    profile: Path
    memory: NodeMemory

    def options(self, policy: str) -> tuple[str, ...]:
        """Return what every member is told."""
        return (
            *("--policy", policy, "--profile", str(self.profile), "--log-level", "warning"),
            *("--slo-ttft-s", str(_SLO.ttft_s), "--slo-tbt-s", str(_SLO.tbt_s), "--drain-s", "1"),
            *("--adapter-bytes", str(self.memory.adapter_bytes)),
            *("--kv-cache-bytes", str(self.memory.kv_bytes)),
        )


def _measured_profile(work: Path, seconds: float) -> Path:
    """Profile one node of the embedded model and return the file."""
    rows, profile = work / "steps.jsonl", work / "profile.json"
    sizes = ("--sequences", "8", "--prompt-tokens", "64", "--seconds", str(seconds), "--dtype", "float32")
    means = ("--mean-prompt-tokens", str(_PROMPT_TOKENS), "--mean-output-tokens", str(_ANSWER_TOKENS // 2))
    for words in (
        ("measure", "--model", str(DEMO_BASE), "--rows", str(rows), *sizes),
        ("fit", "--rows", str(rows), "--profile", str(profile), *means),
    ):
        command = (sys.executable, "-m", "scripts.profile_node", *words)
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise ValueError(f"scripts.profile_node {words[0]} failed, as it said above")
    return profile


def _memory(adapter_bytes: int) -> NodeMemory:
    shape = read_config(DEMO_BASE)
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * _FLOAT_BYTES
    return NodeMemory(adapter_bytes, _KV_BYTES, token_bytes)


def _live_row(figures: LiveFigures) -> Row:
    told = figures.records.summary()
    shown = ("requests", "right", "wrong", "lost", "refused", "ttft_p50_s", "ttft_p95_s")
    return {
        **{name: told[name] for name in shown},
        "held_mib": round(figures.mean_held_bytes / _MIB, 2),
        "moved_mib": round(figures.moved_bytes / _MIB, 2),
    }


def _forecast_row(done: Replay) -> Row:
    outcome, counted = done.outcome, [each for each in done.samples if each.at_s >= done.counted_s]
    before = max((each.moved_bytes for each in done.samples if each.at_s < done.counted_s), default=0)
    held = sum(each.kept_bytes for each in counted) / max(1, len(counted))
    return {
        "requests": outcome.requests,
        "refused": outcome.refused,
        "ttft_p50_s": round(outcome.ttft_p50_s, 3),
        "ttft_p95_s": round(outcome.ttft_p95_s, 3),
        "held_mib": round(held / _MIB, 2),
        "moved_mib": round((done.last.moved_bytes - before) / _MIB, 2),
    }


def _run(comparison: Comparison, policy: str, asked: Sequence[Asked], answers: Answers, seed: int) -> Row:
    """Run one policy live, foretell it, and return the row."""
    with tempfile.TemporaryDirectory() as work:
        plan = ClusterPlan(
            comparison.nodes, 1, comparison.adapters, Path(work), comparison.options(policy), owners=1
        )
        began_s, busy_s = time.monotonic(), machine.busy_s()
        live = asyncio.run(LiveRun(plan, asked, answers, seed).run(len({each.adapter for each in asked})))
        cores = (machine.busy_s() - busy_s) / (time.monotonic() - began_s)
    told = replace(from_json(comparison.profile.read_text()), slo=_SLO)
    foretold = forecast(
        policy, comparison.nodes, told, comparison.memory, asked, _PROMPT_TOKENS, live.adapters, seed
    )
    return {
        "policy": policy, "seed": seed, "cores_busy": round(cores, 2),
        "live": _live_row(live), "forecast": _forecast_row(foretold),
    }  # fmt: skip


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", default="ours,toppings,slora-random", metavar="NAME,...")
    parser.add_argument("--nodes", type=count, default=3)
    parser.add_argument("--adapters", type=count, default=60)
    parser.add_argument("--adapter-mib", type=count, default=96, help="of each node, for adapters")
    parser.add_argument("--rate", type=positive, default=2.0, help="requests a second, in the mean")
    parser.add_argument("--seconds", type=positive, default=90.0)
    parser.add_argument("--rounds", type=count, default=2, help="runs of each policy, each with its own seed")
    parser.add_argument(
        "--profile-s", type=positive, default=60.0, help="seconds in which a node is profiled"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the rows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = _options(arguments)
    with one_line("scripts.bench.placement"), tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        copies = plan_copies(options.adapters, options.seed)
        write_copies(copies, work / "adapters", options.seed)
        profile = _measured_profile(work, options.profile_s)
        comparison = Comparison(
            options.nodes, work / "adapters", profile, _memory(options.adapter_mib * _MIB)
        )
        answers = Answers(_WORDS, _ANSWER_TOKENS, options.seed)
        for seed in range(options.seed, options.seed + options.rounds):
            rng = np.random.default_rng(seed)
            calls = poisson(options.rate, options.seconds, (_PROMPT_TOKENS, _ANSWER_TOKENS), rng)
            law = Turning(ZipfLaw(0.8), _TURNS)
            asked = draw_questions(copies, answers, calls, rng, law)
            for policy in options.policies.split(","):
                row = _run(comparison, policy, asked, answers, seed)
                print(row)
                if options.out is not None:
                    kept = {key: value for key, value in vars(options).items() if key not in ("out", "seed")}
                    append_rows(options.out, [{**kept, **row}])


if __name__ == "__main__":
    main()
