"""Run loraserve under the offline workloads in a process of its own, with the baselines' command line and output.

    python -m scripts.bench.engine.harness --model build/bench/100m --adapters build/bench/100m-adapters/index.json
        --workload b8_mixed.json --out-dir build/bench/results

The engine has a prefix cache, the baselines have none. So every run but the first has its prompts' first
tokens changed, and no run may find a cached prefix.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch

from engine import LLM, Result, SamplingParams
from model.config import DtypeChoice
from scripts.arguments import seconds
from scripts.bench import machine
from scripts.bench.engine import workload
from scripts.bench.engine.workload import OfflineRequest, OfflineWorkload
from scripts.bench.llama import read_index

ENGINE_DTYPES: dict[str, DtypeChoice] = {"bf16": "bfloat16", "fp32": "float32"}
WARM_PROMPT_TOKENS, WARM_OUTPUT_TOKENS = 8, 4
KV_CACHE_BYTES = 2 << 30


class PromptWasCached(RuntimeError):
    """The engine found a part of a prompt in its prefix cache, so the run measured less than the work."""


class OfflineEngine(Protocol):
    """What is measured: `engine.LLM`, or a fake of it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        adapters: Sequence[str | None],
    ) -> Sequence[Result]:
        """Answer all prompts."""
        ...


@dataclass(frozen=True, slots=True)
class TimedRun:
    """A workload done once: its results and the seconds it took in all."""

    results: Sequence[Result]
    wall_s: float

    def to_json(self, others_cores: float) -> dict[str, float]:
        """Give the figures that the baselines' harnesses report of a run."""
        times_s = [result.token_times_s for result in self.results]
        output_tokens = sum(map(len, times_s))
        first_s = [each[0] for each in times_s]
        between_s = [(each[-1] - each[0]) / max(1, len(each) - 1) for each in times_s]
        return {
            "wall_s": self.wall_s,
            "output_tokens": output_tokens,
            "output_tok_s": output_tokens / self.wall_s,
            "ttft_mean_s": fmean(first_s),
            "ttft_max_s": max(first_s),
            "tpot_mean_s": fmean(between_s),
            "others": others_cores,
        }


def run(llm: OfflineEngine, requests: Sequence[OfflineRequest]) -> TimedRun:
    """Submit all requests at once and wait for all answers. Raises PromptWasCached."""
    params = [SamplingParams(temperature=0, max_tokens=one.max_tokens, ignore_eos=True) for one in requests]
    start_s = time.perf_counter()
    results = llm.generate(
        [one.prompt_token_ids for one in requests], params, [one.adapter for one in requests]
    )
    wall_s = time.perf_counter() - start_s
    cached_tokens = sum(result.cached_tokens for result in results)
    if cached_tokens:
        raise PromptWasCached(f"{cached_tokens} prompt tokens were cached: give every run prompts of its own")
    return TimedRun(results, wall_s)


def warm(llm: OfflineEngine, requests: Sequence[OfflineRequest]) -> None:
    """Run a few tokens of every request, so that its adapter is resident and the threads exist."""
    short = [
        replace(
            one, prompt_token_ids=one.prompt_token_ids[:WARM_PROMPT_TOKENS], max_tokens=WARM_OUTPUT_TOKENS
        )
        for one in workload.freshen(requests, salt=-1)
    ]
    run(llm, short)


def measure(llm: OfflineEngine, work: OfflineWorkload, repeats: int, quiet_s: float) -> dict[str, object]:
    """Warm up, run `repeats` times, and report as the baselines do; token ids are those of the unchanged prompts."""
    warm(llm, work.requests)
    runs: list[dict[str, float]] = []
    answers: Sequence[Result] = ()
    for repeat in range(repeats):
        machine.wait_quiet(quiet_s)
        with machine.OtherProcesses() as others:
            timed = run(llm, workload.freshen(work.requests, salt=repeat))
        runs.append(timed.to_json(others.cores))
        answers = answers or timed.results
    return {
        "workload": work.name,
        "runs": runs,
        "requests": [{"token_ids": list(result.outputs[0].token_ids)} for result in answers],
        "versions": versions(),
    }


def versions() -> Mapping[str, str]:
    """Give the versions of what ran."""
    return {"torch": torch.__version__, "python": platform.python_version()}


def main() -> None:
    """Measure every workload on one loaded model; write OUT_DIR/NAME.ours.json each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="index.json")
    parser.add_argument("--workload", type=Path, action="append", required=True)
    parser.add_argument("--dtype", choices=ENGINE_DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quiet-wait", type=seconds, default=10, help="seconds to wait for a quiet machine")
    parser.add_argument("--out-dir", type=Path, required=True)
    options = parser.parse_args()
    works = [workload.read(path) for path in options.workload]
    used = {one.adapter for work in works for one in work.requests}
    loras = {entry.name: entry.path for entry in read_index(options.adapters) if entry.name in used}
    dtype = ENGINE_DTYPES[options.dtype]
    llm = LLM(options.model, loras, dtype, kv_cache_bytes=KV_CACHE_BYTES, max_model_len=1024)
    try:
        for work in works:
            report = measure(llm, work, options.repeats, options.quiet_wait)
            (options.out_dir / f"{work.name}.ours.json").write_text(json.dumps(report))
    finally:
        llm.close()


if __name__ == "__main__":
    main()
