"""The digital twin: one trace on a live engine and on the simulator with that engine's profile, side by side.

    python -m scripts.twin --model build/bench/100m --adapters build/bench/100m-adapters/index.json
        --profile scheduler/cluster/profiles/cpu_100m.json --trace azure_llm_2023_conv.csv --out twin.jsonl

A stretch of the trace (or a Poisson process without one) with its lengths scaled to the machine, at the rate at
which the simulator says the node computes the wanted part of the time. Both twins get the same arrivals,
prompts and adapters; neither sees HTTP. Time between tokens is every gap of every request. The pace says how
many times longer than in the profile a few reference steps take just before and just after: where it is not 1,
it is the machine that is not what it was.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, median

import numpy as np
from tqdm import tqdm

from lora.adapter import AdapterRef
from scheduler.cluster.cost import CostModel, Kernel
from scheduler.cluster.profile import from_json
from scheduler.sim.popularity import PowerLaw
from scheduler.sim.trace import Call, paced, poisson, read_trace
from scheduler.sim.workload import assigned
from scripts.bench import live, machine
from scripts.bench.live import Live, Subject
from scripts.bench.quantile import quantile
from scripts.bench.rehearsal import Case, Landings, Part, Rehearsal, draw_prompt
from scripts.bench.twins import Ask, Told, simulated
from scripts.bench.twins import live as ask_live

HALVINGS = 8
REFERENCE_TOKENS, REFERENCES = 64, 5
MOST_RATE = 64.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where calls come from: a trace's from `first` on, their lengths times `length_factor`, or a Poisson
    process of mean `lengths` if there is none."""

    trace: tuple[Call, ...]
    first: int
    seconds: float
    length_factor: float
    lengths: tuple[int, int]
    seed: int

    def calls(self, rate: float) -> list[Call]:
        """So many calls a second, that fit the engine."""
        rng = np.random.default_rng(self.seed)
        if not self.trace:
            drawn = poisson(rate, self.seconds, self.lengths, rng)
            return [_fitting(call, 1.0) for call in drawn]
        return [
            _fitting(call, self.length_factor) for call in paced(self.trace, rate, self.seconds, self.first)
        ]


def _fitting(call: Call, factor: float) -> Call:
    half = live.LIMITS.max_model_len // 2
    prompt_tokens, output_tokens = (
        min(half, max(1, round(tokens * factor))) for tokens in (call.prompt_tokens, call.output_tokens)
    )
    return Call(call.arrival_s, prompt_tokens, output_tokens)


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who asks: adapters, of a popularity by the power law `alpha` over an order that mixes ranks, and the token ids
    of which prompts are made."""

    adapters: tuple[AdapterRef, ...]
    alpha: float
    vocab_size: int
    seed: int


def asks(calls: Sequence[Call], crowd: Crowd) -> list[Ask]:
    """Give every call an adapter and a prompt of its own."""
    rng = Random(f"prompts/{crowd.seed}")
    order = Random(f"order/{crowd.seed}").sample(crowd.adapters, len(crowd.adapters))
    named = assigned(calls, order, PowerLaw(crowd.alpha), np.random.default_rng(crowd.seed))
    return [
        Ask(
            at_s=each.call.arrival_s,
            adapter=each.adapter,
            prompt_token_ids=draw_prompt(each.call.prompt_tokens, crowd.vocab_size, rng),
            output_tokens=each.call.output_tokens,
        )
        for each in named
    ]


def rate_for(busy: Callable[[float], float], wanted: float) -> float:
    """The rate, requests/s, at which the part of the time spent computing is as wanted, by halving."""
    low, high = 0.0, MOST_RATE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if busy(middle) < wanted else (low, middle)
    return (low + high) / 2


def figures(told: Sequence[Told]) -> Mapping[str, float]:
    """What is compared: seconds, and tokens/s from the start to the last token."""
    ttft_s = [each.ttft_s for each in told]
    gaps_s = [gap_s for each in told for gap_s in each.gaps_s]
    tokens = sum(len(each.ask.prompt_token_ids) + len(each.token_times_s) for each in told)
    return {
        "ttft_mean_s": fmean(ttft_s),
        "ttft_p95_s": quantile(ttft_s, 0.95),
        "tbt_mean_s": fmean(gaps_s),
        "tbt_p95_s": quantile(gaps_s, 0.95),
        "tokens_per_s": tokens / max(each.token_times_s[-1] for each in told),
    }


def pace(rehearsal: Rehearsal, model: CostModel, adapters: Sequence[AdapterRef]) -> float:
    """How many times longer than the model says a few steps to order take now: 1 on a machine as it was when it
    was profiled, whatever the model's own error on other steps."""
    mixed = tuple(Part(ref, REFERENCE_TOKENS) for ref in adapters[::4])
    cases = (Case((mixed[0],)), Case(mixed), Case((), mixed[:2]), Case(mixed[:4], mixed[-1:]))
    rows = [row for case in cases * REFERENCES for row in rehearsal.measure(case)]
    return median(row.step_s / model.step_s(row.load) for row in rows)


def to_row(twin: str, told: Told) -> Mapping[str, object]:
    """One request, as one twin answered it."""
    return {
        "what": "request",
        "twin": twin,
        "at_s": round(told.ask.at_s, 4),
        "rank": told.ask.adapter.rank,
        "prompt_tokens": len(told.ask.prompt_token_ids),
        "token_times_s": [round(at_s, 5) for at_s in told.token_times_s],
    }


def draw_load(options: argparse.Namespace, model: CostModel, node: Live) -> tuple[list[Ask], float]:
    """What both twins are asked, and at which rate: the given one, or that of the wanted utilisation."""
    trace = read_trace(options.trace.read_text()) if options.trace else ()
    lengths = (options.mean_prompt_tokens, options.mean_output_tokens)
    source = Source(trace, options.first, options.seconds, options.length_factor, lengths, options.seed)
    crowd = Crowd(node.adapters, options.alpha, node.engine.card.vocab_size, options.seed)

    def busy(rate: float) -> float:
        load = asks(source.calls(rate), crowd)
        return simulated(model, node.room, load)[1] if load else 0.0

    rate = options.rate or rate_for(busy, options.utilisation)
    return asks(source.calls(rate), crowd), rate


def run(options: argparse.Namespace) -> None:
    """Run both twins, print how they compare, append the rows."""
    model = from_json(options.profile.read_text()).model(Kernel.EXACT)
    subject = Subject(options.model, options.adapters, threads=options.threads)
    with ExitStack() as scratch:
        landings = Landings()
        node = live.start(subject, landings.around, scratch)
        load, rate = draw_load(options, model, node)
        foretold, computing = simulated(model, node.room, load)
        rehearsal = Rehearsal(node.engine, landings, options.seed)
        rehearsal.warm(node.adapters)
        paces = [pace(rehearsal, model, node.adapters)]
        with tqdm(total=len(load), unit="request", desc="live") as bar, machine.Others() as others:
            seen = asyncio.run(ask_live(node.engine, load, bar.update))
        paces.append(pace(rehearsal, model, node.adapters))
    about = {
        "what": "run",
        "hardware": node.hardware,
        "base_model": node.base_model,
        "requests": len(load),
        "rate": round(rate, 4),
        "computing": round(computing, 4),
        "pace_before_and_after": [round(each, 3) for each in paces],
        "others_cores": round(others.cores, 3),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    report(about, figures(seen), figures(foretold))
    answered = [("live", each) for each in seen] + [("sim", each) for each in foretold]
    with options.out.open("a") as sink:
        for row in (about, *(to_row(twin, each) for twin, each in answered)):
            print(json.dumps(row), file=sink)


def report(about: Mapping[str, object], seen: Mapping[str, float], foretold: Mapping[str, float]) -> None:
    """Both twins, and how far the simulated one is off."""
    print(", ".join(f"{name} {value}" for name, value in about.items() if name != "what"))
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
    add("--threads", type=int, default=1, help="of torch on a CPU; as the profile's")
    add("--profile", type=Path, required=True)
    add("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens; Poisson without it")
    add("--first", type=int, default=0, help="the trace's call to begin at")
    add("--length-factor", type=float, default=0.125, help="of the trace's lengths")
    add("--mean-prompt-tokens", type=int, default=128)
    add("--mean-output-tokens", type=int, default=32)
    add("--seconds", type=float, default=60.0)
    add("--utilisation", type=float, default=0.6, help="part of the time that the node computes")
    add("--rate", type=float, help="requests/s; instead of --utilisation")
    add("--alpha", type=float, default=0.5, help="popularity's power law: 1 is even, smaller more skewed")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="JSONL to append to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse())
