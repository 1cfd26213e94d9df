"""Draw what both twins are asked: times and lengths of a trace or of chance, each with an adapter and a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from lora.adapter import AdapterRef
from scheduler.sim.workload.popularity import PowerLaw, assigned
from scheduler.sim.workload.trace import Call, paced, poisson
from scripts.bench.twin.answers import TwinRequest
from scripts.profile_node.live_engine import LIMITS
from scripts.profile_node.step_timer import draw_prompt

HALVINGS = 8
MOST_RATE = 64.0


@dataclass(frozen=True, slots=True)
class CallSource:
    """Where calls come from: a trace's from `first` on, their lengths times `length_factor`.

    Without a trace they are a Poisson process of mean `lengths`.
    """

    trace: tuple[Call, ...]
    first: int
    seconds: float
    length_factor: float
    lengths: tuple[int, int]
    seed: int

    def calls(self, rate: float) -> list[Call]:
        """Take so many calls a second, cut to fit the engine."""
        rng = np.random.default_rng(self.seed)
        if not self.trace:
            drawn = poisson(rate, self.seconds, self.lengths, rng)
            return [_fitting(call, 1.0) for call in drawn]
        return [
            _fitting(call, self.length_factor) for call in paced(self.trace, rate, self.seconds, self.first)
        ]


def _fitting(call: Call, factor: float) -> Call:
    half = LIMITS.max_model_len // 2
    prompt_tokens, output_tokens = (
        min(half, max(1, round(tokens * factor))) for tokens in (call.prompt_tokens, call.output_tokens)
    )
    return Call(call.arrival_s, prompt_tokens, output_tokens)


@dataclass(frozen=True, slots=True)
class RequestMix:
    """What requests ask for: adapters by the power law `alpha` over an order that mixes ranks, and random prompts."""

    adapters: tuple[AdapterRef, ...]
    alpha: float
    vocab_size: int
    seed: int


def draw_requests(calls: Sequence[Call], mix: RequestMix) -> list[TwinRequest]:
    """Give every call an adapter and a prompt of its own."""
    rng = Random(f"prompts/{mix.seed}")
    order = Random(f"order/{mix.seed}").sample(mix.adapters, len(mix.adapters))
    named = assigned(calls, order, PowerLaw(mix.alpha), np.random.default_rng(mix.seed))
    return [
        TwinRequest(
            at_s=each.call.arrival_s,
            adapter=each.adapter,
            prompt_token_ids=draw_prompt(each.call.prompt_tokens, mix.vocab_size, rng),
            output_tokens=each.call.output_tokens,
        )
        for each in named
    ]


def rate_for(busy: Callable[[float], float], wanted: float) -> float:
    """Find the rate, requests/s, at which the part of the time spent computing is as wanted, by halving."""
    low, high = 0.0, MOST_RATE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if busy(middle) < wanted else (low, middle)
    return (low + high) / 2
