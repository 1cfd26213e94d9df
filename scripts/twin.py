"""The digital twin: the same requests on a live engine and on the simulator with that engine's profile.

    python -m scripts.twin --model build/bench/100m --adapters build/bench/100m-adapters/index.json
        --trace azure_llm_2023_conv.csv --steps steps.jsonl --out twin.jsonl

A machine that others share is not the same from one minute to the next, so profile and live run take turns:
each round rehearses a slice of the profile's steps, then answers the next stretch of the load. The profile is
fitted to the rehearsed steps of all rounds, none of which served a request, and must then foretell every round.
The load is a stretch of the trace (or a Poisson process without one), its lengths scaled to the machine, at the
rate at which the first slice says that the node computes the wanted part of the time. Both twins get the same
arrivals, prompts and adapters; neither sees HTTP. Time between tokens is every gap of every request. A pace says
how many times longer a slice's steps took than the profile says: they tell how steady the machine was.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, median

from tqdm import tqdm

from scheduler.cluster.cost.fit import Measurement
from scheduler.cluster.cost.model import CostModel
from scheduler.sim.workload.trace import read_trace
from scripts.bench import cases, live, machine
from scripts.bench.demand import Crowd, Source, asks, rate_for
from scripts.bench.live import Live, Subject
from scripts.bench.quantile import quantile
from scripts.bench.rehearsal import Case, Landings, Rehearsal
from scripts.bench.steps import Fitted, fitted, node_row, to_row
from scripts.bench.twins import Ask, Told, simulated
from scripts.bench.twins import live as ask_live


@dataclass(frozen=True, slots=True)
class Round:
    """A slice of rehearsed steps, the requests that followed, and the cores that other processes took meanwhile."""

    steps: tuple[Measurement, ...]
    asks: tuple[Ask, ...]
    told: tuple[Told, ...]
    others_cores: float


class Rounds:
    """Runs rounds, each on an engine of its own, all on one load; `rate` and `node` are known after the first."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._subject = Subject(options.model, options.adapters, threads=options.threads)
        self._stretches: list[tuple[Ask, ...]] = []
        self._cases: Iterator[Case] = iter(())
        self.rate = 0.0
        self.node: Live

    def run(self, at: int) -> Round:
        """Round `at`, counted from 0."""
        with ExitStack() as scratch, machine.Others() as others:
            landings = Landings()
            node = live.start(self._subject, landings.around, scratch)
            rehearsal = Rehearsal(node.engine, landings, seed=at)
            rehearsal.warm(node.adapters)
            if not at:
                self.node, self._cases = node, turns(node, self._options)
            steps = tuple(self._slice(rehearsal))
            if not at:
                self._stretches = self._cut(self._load(node, fitted(steps).model))
            stretch = self._stretches[at]
            with tqdm(total=len(stretch), unit="request", desc=f"live {at + 1}", leave=False) as bar:
                told = asyncio.run(ask_live(node.engine, stretch, bar.update))
        return Round(steps, stretch, tuple(told), others.cores)

    def _slice(self, rehearsal: Rehearsal) -> Iterator[Measurement]:
        deadline_s = time.monotonic() + self._options.rehearse_s
        while time.monotonic() < deadline_s:
            yield from rehearsal.measure(next(self._cases))

    def _load(self, node: Live, model: CostModel) -> list[Ask]:
        """All rounds' requests, at the given rate or that of the wanted utilisation under `model`."""
        options = self._options
        trace = read_trace(options.trace.read_text()) if options.trace else ()
        lengths = (options.mean_prompt_tokens, options.mean_output_tokens)
        seconds = options.rounds * options.seconds
        source = Source(trace, options.first, seconds, options.length_factor, lengths, options.seed)
        crowd = Crowd(node.adapters, options.alpha, node.engine.card.vocab_size, options.seed)

        def busy(rate: float) -> float:
            load = asks(source.calls(rate), crowd)
            return simulated(model, node.room, load)[1] if load else 0.0

        self.rate = options.rate or rate_for(busy, options.utilisation)
        return asks(source.calls(self.rate), crowd)

    def _cut(self, load: Sequence[Ask]) -> list[tuple[Ask, ...]]:
        """Each round's own, its times counted from the round's start."""
        seconds = self._options.seconds
        cut: list[list[Ask]] = [[] for _ in range(self._options.rounds)]
        for ask in load:
            at = min(int(ask.at_s // seconds), len(cut) - 1)
            cut[at].append(replace(ask, at_s=ask.at_s - at * seconds))
        return [tuple(each) for each in cut]


def turns(node: Live, options: argparse.Namespace) -> Iterator[Case]:
    """The profile's cases without end, shuffled anew each time round."""
    bounds = cases.Bounds(options.sequences, options.prompt_tokens)
    planned, rng = cases.planned(node.adapters, bounds, options.draws), Random(f"turns/{options.seed}")
    while True:
        yield from rng.sample(planned, len(planned))


def figures(rounds: Sequence[Sequence[Told]]) -> Mapping[str, float]:
    """What is compared: seconds over all requests, and tokens/s from each round's start to its last token."""
    every = [each for told in rounds for each in told]
    ttft_s = [each.ttft_s for each in every]
    gaps_s = [gap_s for each in every for gap_s in each.gaps_s]
    tokens = sum(len(each.ask.prompt_token_ids) + len(each.token_times_s) for each in every)
    return {
        "ttft_mean_s": fmean(ttft_s),
        "ttft_p95_s": quantile(ttft_s, 0.95),
        "tbt_mean_s": fmean(gaps_s),
        "tbt_p95_s": quantile(gaps_s, 0.95),
        "tokens_per_s": tokens / sum(max(each.token_times_s[-1] for each in told) for told in rounds),
    }


def pace(steps: Sequence[Measurement], model: CostModel) -> float:
    """How many times longer than the model says `steps` took."""
    return median(step.step_s / model.step_s(step.load) for step in steps)


def request_row(twin: str, at: int, told: Told) -> Mapping[str, object]:
    """One request of round `at`, as one twin answered it."""
    return {
        "what": "request",
        "twin": twin,
        "round": at,
        "at_s": round(told.ask.at_s, 4),
        "rank": told.ask.adapter.rank,
        "prompt_tokens": len(told.ask.prompt_token_ids),
        "token_times_s": [round(at_s, 5) for at_s in told.token_times_s],
    }


def run(options: argparse.Namespace) -> None:
    """Run all rounds, print how the twins compare, append the rows."""
    runner = Rounds(options)
    each = [runner.run(at) for at in tqdm(range(options.rounds), unit="round", desc="twin")]
    steps = [step for one in each for step in one.steps]
    found = fitted(steps)
    foretold = [simulated(found.model, runner.node.room, one.asks) for one in each]
    seen, told = figures([one.told for one in each]), figures([one for one, _ in foretold])
    about = {
        "what": "run",
        "hardware": runner.node.hardware,
        "base_model": runner.node.base_model,
        "requests": sum(len(one.asks) for one in each),
        "rounds": options.rounds,
        "rate": round(runner.rate, 4),
        "computing": round(fmean(computing for _, computing in foretold), 4),
        "paces": [round(pace(one.steps, found.model), 3) for one in each],
        "others_cores": round(fmean(one.others_cores for one in each), 3),
        "off_by": {name: round(told[name] / value - 1, 4) for name, value in seen.items()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    report(about, found, seen, told)
    with options.steps.open("a") as sink:
        for row in (node_row(runner.node), *map(to_row, steps)):
            print(json.dumps(row), file=sink)
    with options.out.open("a") as sink:
        print(json.dumps(about), file=sink)
        for at, (one, (simulation, _)) in enumerate(zip(each, foretold, strict=True)):
            for twin, answers in (("live", one.told), ("sim", simulation)):
                for answer in answers:
                    print(json.dumps(request_row(twin, at, answer)), file=sink)


def report(
    about: Mapping[str, object], found: Fitted, seen: Mapping[str, float], foretold: Mapping[str, float]
) -> None:
    """Both twins, and how far the simulated one is off."""
    print(", ".join(f"{name} {value}" for name, value in about.items() if name not in ("what", "off_by")))
    print(
        f"profile: {found.steps} steps of {found.kinds} kinds, held-out error {found.error.median:.1%} (median)"
    )
    print(f"{'':14}{'live':>10}{'simulated':>12}{'off by':>9}")
    for name, value in seen.items():
        print(f"{name:14}{value:10.4f}{foretold[name]:12.4f}{foretold[name] / value - 1:+9.1%}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder or hub id")
    add("--adapters", type=Path, help="an index.json; synthetic ones without it")
    add("--threads", type=int, default=1, help="of torch on a CPU")
    add("--rounds", type=int, default=8)
    add("--rehearse-s", type=float, default=40.0, help="seconds of rehearsal in a round")
    add("--sequences", type=int, default=16, help="that decode in a rehearsed step, at most")
    add("--prompt-tokens", type=int, default=512, help="of one rehearsed prompt, at most")
    add("--draws", type=int, default=60, help="mixed cases beside the grid")
    add("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens; Poisson without it")
    add("--first", type=int, default=0, help="the trace's call to begin at")
    add("--length-factor", type=float, default=0.125, help="of the trace's lengths")
    add("--mean-prompt-tokens", type=int, default=128)
    add("--mean-output-tokens", type=int, default=32)
    add("--seconds", type=float, default=40.0, help="of load in a round")
    add("--utilisation", type=float, default=0.6, help="part of the time that the node computes")
    add("--rate", type=float, help="requests/s; instead of --utilisation")
    add("--alpha", type=float, default=0.5, help="popularity's power law: 1 is even, smaller more skewed")
    add("--seed", type=int, default=0)
    add("--steps", type=Path, required=True, help="JSONL to append rehearsed steps to; profile_node fits it")
    add("--out", type=Path, required=True, help="JSONL to append both twins' answers to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse())
