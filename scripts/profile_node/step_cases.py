"""Choose the steps that a profile is made of: a grid that moves one thing at a time, and draws in which all move.

Without the grid the fit could not tell coefficients apart; without the draws it would not meet the mixtures
that serving makes. Knows nothing of how steps are timed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from lora.adapter import BASE, AdapterRef
from scripts.profile_node.step_timer import CaseSequence, StepCase


@dataclass(frozen=True, slots=True)
class CaseBounds:
    """The most of a case: sequences that decode, and tokens of one prompt."""

    sequences: int = 32
    prompt_tokens: int = 512


def by_rank(adapters: Sequence[AdapterRef]) -> Mapping[int, Sequence[AdapterRef]]:
    """Group the adapters by rank, ranks rising."""
    ranks = sorted({ref.rank for ref in adapters})
    return {rank: [ref for ref in adapters if ref.rank == rank] for rank in ranks}


def doublings(most: int, least: int = 1) -> list[int]:
    """List `least`, twice that, and so on up to `most`."""
    return [least << power for power in range(most.bit_length()) if least << power <= most]


def grid(adapters: Sequence[AdapterRef], bounds: CaseBounds) -> Iterator[StepCase]:
    """Yield decoding by batch size, by context, and by rank with one adapter and with several; then prefill.

    Prefill varies by length, by rank, and by number of prompts.
    """
    for count in doublings(bounds.sequences):
        yield StepCase((CaseSequence(BASE, 64),) * count)
    for tokens in doublings(bounds.prompt_tokens, least=16):
        yield StepCase((CaseSequence(BASE, tokens),) * min(8, bounds.sequences))
        yield StepCase((), (CaseSequence(BASE, tokens),))
    for refs in by_rank(adapters).values():
        for count in doublings(min(8, bounds.sequences)):
            yield StepCase((CaseSequence(refs[0], 64),) * count)
            yield StepCase(tuple(CaseSequence(ref, 64) for ref in refs[:count]))
        for tokens in doublings(bounds.prompt_tokens, least=32)[::2]:
            yield StepCase((), (CaseSequence(refs[0], tokens),))
        yield StepCase((), tuple(CaseSequence(ref, 32) for ref in refs[:4]))


def draws(adapters: Sequence[AdapterRef], bounds: CaseBounds, count: int, rng: Random) -> Iterator[StepCase]:
    """Draw steps as serving has them: sequences of any adapters (one in eight of the base), and up to three prompts."""

    def part(most_tokens: int) -> CaseSequence:
        ref = BASE if rng.random() < 1 / 8 else rng.choice(adapters)
        return CaseSequence(ref, int(2 ** rng.uniform(3, most_tokens.bit_length() - 1)))

    for _ in range(count):
        sequences = int(2 ** rng.uniform(0, (bounds.sequences + 1).bit_length() - 1))
        prompts = rng.choice((0, 1, 1, 1, 2, 3))
        yield StepCase(
            tuple(part(bounds.prompt_tokens) for _ in range(sequences)),
            tuple(part(bounds.prompt_tokens) for _ in range(prompts)),
        )


def planned(adapters: Sequence[AdapterRef], bounds: CaseBounds, count: int) -> list[StepCase]:
    """List the grid, then `count` draws, always the same; no case twice."""
    drawn = draws(adapters, bounds, count, Random("cases"))
    return list(dict.fromkeys((*grid(adapters, bounds), *drawn)))
