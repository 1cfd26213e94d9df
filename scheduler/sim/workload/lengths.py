"""How long prompts and answers are, where that is not left to a trace.

Chance is an argument. Calls go in and come out at the same times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.sim.workload.trace import Call

Ints = NDArray[np.int64]
Drawn = tuple[Ints, Ints]
"""Tokens of prompts and of answers."""


class InvalidLengths(ValueError):
    """A law of lengths that cannot be read; the message gives those that can."""


class LengthLaw(Protocol):
    """How long requests are."""

    def draw(self, calls: Sequence[Call], rng: np.random.Generator) -> Drawn:
        """Draw the tokens of as many prompts and answers; `calls` are those of a trace."""
        ...


@dataclass(frozen=True, slots=True)
class TracedLengths:
    """What the trace says."""

    def draw(self, calls: Sequence[Call], rng: np.random.Generator) -> Drawn:
        """Draw nothing."""
        prompts = np.array([call.prompt_tokens for call in calls], dtype=np.int64)
        return prompts, np.array([call.output_tokens for call in calls], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class HeavyTailedLengths:
    """Log-normal lengths, each cut at its most.

    The medians and the spreads (standard deviations of the logarithm) are those of 38 requests of BurstGPT
    (arXiv 2401.17644): the first that its data set's page shows, without those that have no answer. So they
    are like its conversations and no fit to the whole. Where they are cut is our choice. A prompt has 1,018
    tokens in the mean then, an answer 406.
    """

    medians: tuple[float, float] = (394.0, 272.0)
    spreads: tuple[float, float] = (1.49, 0.90)
    most: tuple[int, int] = (8192, 4096)

    def draw(self, calls: Sequence[Call], rng: np.random.Generator) -> Drawn:
        """Draw prompts and answers apart."""
        prompts, answers = (
            np.clip(rng.lognormal(np.log(median), spread, len(calls)), 1, most).astype(np.int64)
            for median, spread, most in zip(self.medians, self.spreads, self.most, strict=True)
        )
        return prompts, answers


@dataclass(frozen=True, slots=True)
class LongPrompts:
    """`part` of the prompts are evenly from `least` to `most` tokens long; all else is as the trace says."""

    part: float = 1.0
    least: int = 8192
    most: int = 16384

    def draw(self, calls: Sequence[Call], rng: np.random.Generator) -> Drawn:
        """Draw which are long, and how long."""
        prompts, answers = TracedLengths().draw(calls, rng)
        is_long = rng.random(len(calls)) < self.part
        return np.where(is_long, rng.integers(self.least, self.most + 1, len(calls)), prompts), answers


def length_law(text: str) -> LengthLaw:
    """Read a law: `trace`, `burstgpt`, `long` or `long:PART`."""
    name, colon, given = text.partition(":")
    try:
        part = float(given) if colon else 1.0
    except ValueError:
        part = -1.0
    laws: dict[str, LengthLaw] = {
        "trace": TracedLengths(),
        "burstgpt": HeavyTailedLengths(),
        "long": LongPrompts(part),
    }
    if name not in laws or (colon and name != "long") or not 0 < part <= 1:
        raise InvalidLengths(f"lengths={text!r}: give trace, burstgpt or long[:PART], PART in (0, 1]")
    return laws[name]


def with_lengths(calls: Sequence[Call], law: LengthLaw, rng: np.random.Generator) -> tuple[Call, ...]:
    """Return calls at the same times, as long as `law` has it."""
    prompts, answers = law.draw(calls, rng)
    return tuple(
        Call(call.arrival_s, prompt, answer)
        for call, prompt, answer in zip(calls, prompts.tolist(), answers.tolist(), strict=True)
    )
