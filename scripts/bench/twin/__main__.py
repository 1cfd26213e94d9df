"""Compare the simulator with a live engine: the same requests on both, the simulator with that engine's profile.

    python -m scripts.bench.twin --model build/bench/100m --adapters build/bench/100m-adapters/index.json
        --trace azure_llm_2023_conv.csv --steps steps.jsonl --out twin.jsonl

A machine that others share is not the same from one minute to the next, so profile and live run take turns.
Each round times a slice of the profile's steps, then answers the next stretch of the load. The profile is
fitted to the timed steps of all rounds, none of which served a request, and must then predict every round.

The load is a stretch of the trace, or a Poisson process without one, its lengths scaled to the machine. Its
rate is that at which, by the first slice, the node computes the wanted part of the time. Both twins get the
same arrivals, prompts and adapters; neither sees HTTP. Time between tokens is every gap of every request. A
pace says how many times longer a slice's steps took than the profile says: it tells how steady the machine
was.
"""

import argparse
import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, median

import numpy as np
from tqdm import tqdm

from scheduler.cluster.cost.fit import Measurement
from scheduler.cluster.cost.model import CostModel
from scheduler.sim.workload.trace import read_trace
from scripts.arguments import count, one_line, positive, seconds
from scripts.bench import machine
from scripts.bench.twin.answers import TwinAnswer, TwinRequest, answer_live, answer_simulated
from scripts.bench.twin.load import CallSource, RequestMix, draw_requests, rate_for
from scripts.profile_node.live_engine import EngineSpec, LiveEngine, add_engine_options, start_engine
from scripts.profile_node.step_cases import CaseBounds, planned
from scripts.profile_node.step_rows import FittedModel, fitted, node_row, to_row
from scripts.profile_node.step_timer import StepCase, StepEnds, StepTimer
from scripts.results import Row, append_rows


@dataclass(frozen=True, slots=True)
class TwinRound:
    """A slice of timed steps, the requests that followed, and the cores that other processes took meanwhile."""

    steps: tuple[Measurement, ...]
    requests: tuple[TwinRequest, ...]
    answers: tuple[TwinAnswer, ...]
    others_cores: float


class RoundRunner:
    """Runs rounds, each on an engine of its own, all on one load; `rate` and `node` are known after the first."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._spec = EngineSpec(options.model, options.adapters, threads=options.threads)
        self._stretches: list[tuple[TwinRequest, ...]] = []
        self._cases: Iterator[StepCase] = iter(())
        self.rate = 0.0
        self.node: LiveEngine

    def run(self, at: int) -> TwinRound:
        """Run round `at`, counted from 0."""
        with ExitStack() as scratch, machine.OtherProcesses() as others:
            ends = StepEnds()
            node = start_engine(self._spec, ends.around, scratch)
            timer = StepTimer(node.engine, ends, seed=at)
            timer.warm(node.adapters)
            if not at:
                self.node, self._cases = node, turns(node, self._options)
            steps = tuple(self._slice(timer))
            if not at:
                self._stretches = self._cut(self._load(node, fitted(steps).model))
            stretch = self._stretches[at]
            with tqdm(total=len(stretch), unit="request", desc=f"live {at + 1}", leave=False) as bar:
                answers = asyncio.run(answer_live(node.engine, stretch, bar.update))
        return TwinRound(steps, stretch, tuple(answers), others.cores)

    def _slice(self, timer: StepTimer) -> Iterator[Measurement]:
        deadline_s = time.monotonic() + self._options.timing_s
        while time.monotonic() < deadline_s:
            yield from timer.measure(next(self._cases))

    def _load(self, node: LiveEngine, model: CostModel) -> list[TwinRequest]:
        """Draw all rounds' requests, at the given rate or that of the wanted utilisation under `model`."""
        options = self._options
        trace = read_trace(options.trace.read_text()) if options.trace else ()
        lengths = (options.mean_prompt_tokens, options.mean_output_tokens)
        seconds = options.rounds * options.seconds
        source = CallSource(trace, options.first, seconds, options.length_factor, lengths, options.seed)
        mix = RequestMix(node.adapters, options.alpha, node.engine.card.vocab_size, options.seed)

        def busy(rate: float) -> float:
            load = draw_requests(source.calls(rate), mix)
            return answer_simulated(model, node.capacity, load)[1] if load else 0.0

        self.rate = options.rate or rate_for(busy, options.utilisation)
        return draw_requests(source.calls(self.rate), mix)

    def _cut(self, load: Sequence[TwinRequest]) -> list[tuple[TwinRequest, ...]]:
        """Cut out each round's own, its times counted from the round's start."""
        seconds = self._options.seconds
        cut: list[list[TwinRequest]] = [[] for _ in range(self._options.rounds)]
        for request in load:
            at = min(int(request.at_s // seconds), len(cut) - 1)
            cut[at].append(replace(request, at_s=request.at_s - at * seconds))
        return [tuple(each) for each in cut]


def turns(node: LiveEngine, options: argparse.Namespace) -> Iterator[StepCase]:
    """Yield the profile's cases without end, shuffled anew each time round."""
    bounds = CaseBounds(options.sequences, options.prompt_tokens)
    cases, rng = planned(node.adapters, bounds, options.draws), Random(f"turns/{options.seed}")
    while True:
        yield from rng.sample(cases, len(cases))


def figures(rounds: Sequence[Sequence[TwinAnswer]]) -> Mapping[str, float]:
    """Compute what is compared: seconds over all requests, and tokens/s from each round's start to its last token."""
    every = [answer for answers in rounds for answer in answers]
    ttft_s = [answer.ttft_s for answer in every]
    gaps_s = [gap_s for answer in every for gap_s in answer.gaps_s]
    tokens = sum(len(answer.request.prompt_token_ids) + len(answer.token_times_s) for answer in every)
    busy_s = sum(max(answer.token_times_s[-1] for answer in answers) for answers in rounds)
    return {
        "ttft_mean_s": fmean(ttft_s),
        "ttft_p95_s": float(np.quantile(ttft_s, 0.95)),
        "tbt_mean_s": fmean(gaps_s),
        "tbt_p95_s": float(np.quantile(gaps_s, 0.95)),
        "tokens_per_s": tokens / busy_s,
    }


def pace(steps: Sequence[Measurement], model: CostModel) -> float:
    """Compute how many times longer than the model says `steps` took."""
    return median(step.step_s / model.step_s(step.load) for step in steps)


def request_row(twin: str, at: int, answer: TwinAnswer) -> Row:
    """Make the row of one request of round `at`, as one twin answered it."""
    return {
        "what": "request",
        "twin": twin,
        "round": at,
        "at_s": round(answer.request.at_s, 4),
        "rank": answer.request.adapter.rank,
        "prompt_tokens": len(answer.request.prompt_token_ids),
        "token_times_s": [round(at_s, 5) for at_s in answer.token_times_s],
    }


def run(options: argparse.Namespace) -> None:
    """Run all rounds, print how the twins compare, append the rows."""
    runner = RoundRunner(options)
    each = [runner.run(at) for at in tqdm(range(options.rounds), unit="round", desc="twin")]
    steps = [step for one in each for step in one.steps]
    found = fitted(steps)
    simulated = [answer_simulated(found.model, runner.node.capacity, one.requests) for one in each]
    live, predicted = figures([one.answers for one in each]), figures([one for one, _ in simulated])
    about = {
        "what": "run",
        "hardware": runner.node.hardware,
        "base_model": runner.node.base_model,
        "requests": sum(len(one.requests) for one in each),
        "rounds": options.rounds,
        "rate": round(runner.rate, 4),
        "computing": round(fmean(computing for _, computing in simulated), 4),
        "paces": [round(pace(one.steps, found.model), 3) for one in each],
        "others_cores": round(fmean(one.others_cores for one in each), 3),
        "off_by": {name: round(predicted[name] / value - 1, 4) for name, value in live.items()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    report(about, found, live, predicted)
    append_rows(options.steps, [node_row(runner.node), *map(to_row, steps)])
    append_rows(options.out, [about])
    for at, (one, (answers, _)) in enumerate(zip(each, simulated, strict=True)):
        append_rows(options.out, [request_row("live", at, answer) for answer in one.answers])
        append_rows(options.out, [request_row("sim", at, answer) for answer in answers])


def report(about: Row, found: FittedModel, live: Mapping[str, float], predicted: Mapping[str, float]) -> None:
    """Print both twins, and how far the simulated one is off."""
    print(", ".join(f"{name} {value}" for name, value in about.items() if name not in ("what", "off_by")))
    print(
        f"profile: {found.steps} steps of {found.kinds} kinds, held-out error {found.error.median:.1%} (median)"
    )
    print(f"{'':14}{'live':>10}{'simulated':>12}{'off by':>9}")
    for name, value in live.items():
        print(f"{name:14}{value:10.4f}{predicted[name]:12.4f}{predicted[name] / value - 1:+9.1%}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_engine_options(parser)
    add("--rounds", type=count, default=8)
    add("--timing-s", type=seconds, default=40.0, help="seconds in a round in which steps are timed")
    add("--sequences", type=count, default=16, help="that decode in a timed step, at most")
    add("--prompt-tokens", type=count, default=512, help="of one timed prompt, at most")
    add("--draws", type=int, default=60, help="mixed cases beside the grid")
    add("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens; Poisson without it")
    add("--first", type=int, default=0, help="the trace's call to begin at")
    add("--length-factor", type=positive, default=0.125, help="of the trace's lengths")
    add("--mean-prompt-tokens", type=int, default=128)
    add("--mean-output-tokens", type=int, default=32)
    add("--seconds", type=seconds, default=40.0, help="of load in a round")
    add("--utilisation", type=positive, default=0.6, help="part of the time that the node computes")
    add("--rate", type=positive, help="requests/s; instead of --utilisation")
    add("--alpha", type=positive, default=0.5, help="popularity's power law: 1 is even, smaller more skewed")
    add("--seed", type=int, default=0)
    add("--steps", type=Path, required=True, help="JSONL to append timed steps to; profile_node fits it")
    add("--out", type=Path, required=True, help="JSONL to append both twins' answers to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with one_line("scripts.bench.twin"):
        run(parse())
