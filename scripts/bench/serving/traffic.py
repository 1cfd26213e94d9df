"""Decide who asks for what, and when, before anything is sent. Knows nothing of how requests are sent.

Times of arrival are the simulator's, read from a trace or drawn as a Poisson process. Popularity follows
Zipf's law: the k-th most popular adapter is asked for in proportion to 1 / k^s.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from scheduler.sim.workload.popularity import Known, chosen
from scheduler.sim.workload.trace import Call, poisson


class ClientFault(Enum):
    """What a bad client does: leaves in the middle of its answer, or sends what no server can honour."""

    LEAVES = "leaves"
    BAD_JSON = "bad json"
    UNKNOWN_MODEL = "unknown model"
    WRONG_TYPE = "wrong type"
    WRONG_VALUE = "wrong value"
    MISSING_FIELD = "missing field"
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to come, `at_s` seconds after the start. `model` is an adapter's name or the base's."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    fault: ClientFault | None = None


@dataclass(frozen=True, slots=True)
class ModelPopularity:
    """The models that can be asked for, and the share of the requests that each gets."""

    names: tuple[str, ...]
    shares: tuple[float, ...]


def zipf(
    base: str, adapters: Sequence[str], skew: float, base_share: float, rng: np.random.Generator
) -> ModelPopularity:
    """Give the base its share, and the k-th adapter of a drawn order a part of the rest that falls as 1 / k^skew.

    Where there are no adapters the base has everything.
    """
    if not adapters:
        return ModelPopularity((base,), (1.0,))
    places: list[int] = rng.permutation(len(adapters)).tolist()
    order = [adapters[place] for place in places]
    weights = np.arange(1, len(order) + 1) ** -float(skew)
    shares = (1 - base_share) * weights / weights.sum()
    return ModelPopularity((base, *order), (base_share, *shares.tolist()))


def at_once(
    count: int, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], rng: np.random.Generator
) -> list[Call]:
    """Draw calls that all come at second 0, lengths evenly from ranges that include both ends."""
    return _with_lengths([0.0] * count, prompt_tokens, output_tokens, rng)


def at_rate(
    rate_per_s: float,
    seconds: float,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    rng: np.random.Generator,
) -> list[Call]:
    """Draw a Poisson process over `seconds`, lengths evenly from ranges that include both ends."""
    times_s = [call.arrival_s for call in poisson(rate_per_s, seconds, (1, 1), rng)]
    return _with_lengths(times_s, prompt_tokens, output_tokens, rng)


def _with_lengths(
    times_s: Sequence[float],
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    rng: np.random.Generator,
) -> list[Call]:
    prompts, outputs = (
        rng.integers(*span, len(times_s), endpoint=True).tolist() for span in (prompt_tokens, output_tokens)
    )
    return [Call(*each) for each in zip(times_s, prompts, outputs, strict=True)]


def fit(calls: Sequence[Call], most_tokens: int) -> list[Call]:
    """Shrink lengths by one factor, so that their proportions stay and 99 of 100 calls fit a model's context.

    Of the others the prompt is cut. Each keeps a token of both kinds. Calls that fit stay as they are.
    """
    usual = float(np.quantile([call.prompt_tokens + call.output_tokens for call in calls], 0.99))
    factor = min(1.0, most_tokens / usual)
    fitted: list[Call] = []
    for call in calls:
        output_tokens = min(max(1, math.floor(call.output_tokens * factor)), most_tokens - 1)
        prompt_tokens = min(max(1, math.floor(call.prompt_tokens * factor)), most_tokens - output_tokens)
        fitted.append(Call(call.arrival_s, prompt_tokens, output_tokens))
    return fitted


def plan_requests(
    calls: Sequence[Call], popularity: ModelPopularity, fault_share: float, rng: np.random.Generator
) -> Iterator[PlannedRequest]:
    """Give every call a model, and the given share of them a fault.

    Every second of the faulty ones leaves; the others are malformed in turn.
    """
    models = chosen(
        Known(popularity.shares), np.zeros(len(popularity.names), np.int64), np.zeros(len(calls)), rng
    )
    malformed = itertools.cycle(fault for fault in ClientFault if fault is not ClientFault.LEAVES)
    turns = itertools.cycle((lambda: ClientFault.LEAVES, lambda: next(malformed)))
    places: list[int] = models.tolist()
    for call, place in zip(calls, places, strict=True):
        fault = next(turns)() if rng.random() < fault_share else None
        name = popularity.names[place]
        yield PlannedRequest(call.arrival_s, name, call.prompt_tokens, call.output_tokens, fault)
