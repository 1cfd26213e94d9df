"""Traffic: who asks for what, and when. Drawn from a seed or read from a trace, before anything is sent.

Popularity follows Zipf's law (the k-th most popular adapter is asked for in proportion to 1 / k^s), arrivals
a Poisson process or a trace's time stamps. It may not know how requests are sent.
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from random import Random

from scripts.bench.quantile import quantile


class Fault(Enum):
    """What a bad client does: leaves in the middle of its answer, or sends what no server can honour."""

    LEAVES = "leaves"
    BAD_JSON = "bad json"
    UNKNOWN_MODEL = "unknown model"
    WRONG_TYPE = "wrong type"
    WRONG_VALUE = "wrong value"
    MISSING_FIELD = "missing field"
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come, `at_s` seconds after the start. `model` is an adapter's name or the base's."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Popularity:
    """Names with their cumulative weights."""

    names: tuple[str, ...]
    bounds: tuple[float, ...]

    def draw(self, rng: Random) -> str:
        """One name."""
        return rng.choices(self.names, cum_weights=self.bounds)[0]


def zipf(base: str, adapters: Sequence[str], skew: float, base_share: float, rng: Random) -> Popularity:
    """Adapters in a drawn order of popularity, weight 1 / k^skew for the k-th, and the base with a share of
    all; the base has everything where there are no adapters."""
    if not adapters:
        return Popularity((base,), (1.0,))
    order = rng.sample(adapters, len(adapters))
    weights = [1 / place**skew for place in range(1, len(order) + 1)]
    scale = (1 - base_share) / sum(weights)
    bounds = itertools.accumulate([base_share, *(weight * scale for weight in weights)])
    return Popularity((base, *order), tuple(bounds))


@dataclass(frozen=True, slots=True)
class Call:
    """When a request comes and how long it is."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def poisson(
    rate_per_s: float, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], rng: Random
) -> Iterator[Call]:
    """Calls without end, independent of one another, at a mean rate (infinite: all at once); lengths are
    drawn evenly from ranges that include both ends."""
    at_s = 0.0
    while True:
        yield Call(at_s, rng.randint(*prompt_tokens), rng.randint(*output_tokens))
        at_s += 0.0 if math.isinf(rate_per_s) else rng.expovariate(rate_per_s)


def read_trace(path: Path, time_scale: float) -> list[Call]:
    """A CSV of TIMESTAMP, ContextTokens, GeneratedTokens; gaps between arrivals are stretched by
    `time_scale`."""
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    stamps = [datetime.fromisoformat(row["TIMESTAMP"]) for row in rows]
    return [
        Call(
            at_s=(stamp - stamps[0]).total_seconds() * time_scale,
            prompt_tokens=int(row["ContextTokens"]),
            output_tokens=int(row["GeneratedTokens"]),
        )
        for stamp, row in zip(stamps, rows, strict=True)
    ]


def fit(calls: Sequence[Call], most_tokens: int) -> list[Call]:
    """Calls that fit a model's context: lengths shrink by one factor, so that their proportions stay and 99
    of 100 calls fit; of the others the prompt is cut. Each keeps a token of both kinds. Calls that fit stay
    as they are."""
    usual = quantile([call.prompt_tokens + call.output_tokens for call in calls], 0.99)
    factor = min(1.0, most_tokens / usual)
    fitted: list[Call] = []
    for call in calls:
        output_tokens = min(max(1, math.floor(call.output_tokens * factor)), most_tokens - 1)
        prompt_tokens = min(max(1, math.floor(call.prompt_tokens * factor)), most_tokens - output_tokens)
        fitted.append(Call(call.at_s, prompt_tokens, output_tokens))
    return fitted


def arrivals(
    calls: Iterator[Call], popularity: Popularity, fault_share: float, rng: Random
) -> Iterator[Arrival]:
    """Give every call a model, and the given share of them a fault: every second of those leaves, the others
    are malformed in turn."""
    malformed = itertools.cycle(fault for fault in Fault if fault is not Fault.LEAVES)
    turns = itertools.cycle((lambda: Fault.LEAVES, lambda: next(malformed)))
    for call in calls:
        fault = next(turns)() if rng.random() < fault_share else None
        model = popularity.draw(rng)
        yield Arrival(call.at_s, model, call.prompt_tokens, call.output_tokens, fault)
