"""Who asks for what, when: catalogues of adapters, their popularity, and arrivals drawn or read from a trace.

Text and an rng in, values out; reading files is left to whoever has a file system.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

import numpy as np

from lora.adapter import AdapterRef

_BYTES_PER_RANK = 2 * 2**20  # a 7B model's q, k, v, o


class InvalidTrace(ValueError):
    """A trace that lacks a column or has a field that is not what the column holds."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to be: when it arrives, and how long prompt and output are."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int

    def sooner(self, times: float) -> "Call":
        """The same call where time runs `times` as fast."""
        return Call(self.arrival_s / times, self.prompt_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call that names its adapter."""

    name: str
    call: Call
    adapter: AdapterRef


class RankMix(Enum):
    """Ranks of a catalogue as (rank, part): equal numbers of 8 to 128, or mostly small."""

    UNIFORM = ((8, 0.2), (16, 0.2), (32, 0.2), (64, 0.2), (128, 0.2))
    SKEWED = ((8, 0.7), (16, 0.2), (64, 0.08), (128, 0.02))


def catalogue(count: int, mix: RankMix, bytes_per_rank: int = _BYTES_PER_RANK) -> tuple[AdapterRef, ...]:
    """`count` adapters whose ranks follow `mix` as evenly as can be, interleaved, so that a popular adapter
    may have any rank."""
    owed = dict.fromkeys((rank for rank, _ in mix.value), 0.0)
    refs: list[AdapterRef] = []
    for at in range(count):
        for rank, part in mix.value:
            owed[rank] += part
        rank = max(owed, key=lambda rank: owed[rank])
        owed[rank] -= 1
        refs.append(AdapterRef(f"{at:08x}", f"adapter-{at}", rank, ("q_proj",), rank * bytes_per_rank))
    return tuple(refs)


def popular(count: int, alpha: float, draws: int, rng: np.random.Generator) -> Sequence[int]:
    """Indices by S-LoRA's power law, floor(count · U^(1/alpha)): 1 is uniform, smaller is more skewed."""
    return np.minimum(count - 1, np.floor(count * rng.random(draws) ** (1 / alpha))).astype(int).tolist()


def read_trace(text: str) -> tuple[Call, ...]:
    """The calls of an Azure LLM inference trace (CSV with TIMESTAMP, ContextTokens, GeneratedTokens), the
    first at 0 s. Timestamps have seven decimals, of which the last is below a microsecond and is dropped."""
    rows = list(csv.DictReader(text.splitlines()))
    try:
        stamps = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidTrace(
            f"the trace is not TIMESTAMP,ContextTokens,GeneratedTokens in every row: {error!r}"
        ) from error
    first = min(stamps, default=0.0)
    calls = (Call(at - first, *map(_at_least_one, size)) for at, size in zip(stamps, lengths, strict=True))
    return tuple(sorted(calls, key=lambda call: call.arrival_s))


def poisson(
    rate: float, seconds: float, lengths: tuple[int, int], rng: np.random.Generator
) -> tuple[Call, ...]:
    """Calls at `rate` a second; prompt and output lengths are geometric with the means `lengths`."""
    count = int(rng.poisson(rate * seconds))
    times = np.sort(rng.random(count) * seconds).tolist()
    prompts, outputs = (rng.geometric(1 / mean, count).tolist() for mean in lengths)
    return tuple(Call(*each) for each in zip(times, prompts, outputs, strict=True))


def assigned(
    calls: Sequence[Call], adapters: Sequence[AdapterRef], alpha: float, rng: np.random.Generator
) -> Iterator[Arrival]:
    """Each call with an adapter drawn by `popular`."""
    for at, (call, index) in enumerate(
        zip(calls, popular(len(adapters), alpha, len(calls), rng), strict=True)
    ):
        yield Arrival(f"r{at}", call, adapters[index])


def flash_crowd(
    arrivals: Sequence[Arrival],
    adapter: AdapterRef,
    window_s: tuple[float, float],
    part: float,
    rng: np.random.Generator,
) -> tuple[Arrival, ...]:
    """The same arrivals, but in the window the given part of them asks for `adapter`."""
    turned = rng.random(len(arrivals)) < part
    start, end = window_s
    return tuple(
        Arrival(each.name, each.call, adapter) if turn and start <= each.call.arrival_s < end else each
        for each, turn in zip(arrivals, turned, strict=True)
    )


def _at_least_one(tokens: int) -> int:
    return max(1, tokens)
