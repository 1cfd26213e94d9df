"""Which steps a profile is made of: a grid that moves one thing at a time, and draws in which all move.

Without the grid the fit could not tell coefficients apart; without the draws it would not meet the mixtures
that serving makes. It may not know how steps are timed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from lora.adapter import BASE, AdapterRef
from scripts.bench.rehearsal import Case, Part


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is asked for at most: sequences that decode, and tokens of one prompt."""

    sequences: int = 32
    prompt_tokens: int = 512


def by_rank(adapters: Sequence[AdapterRef]) -> Mapping[int, Sequence[AdapterRef]]:
    """The adapters of each rank, ranks rising."""
    ranks = sorted({ref.rank for ref in adapters})
    return {rank: [ref for ref in adapters if ref.rank == rank] for rank in ranks}


def doublings(most: int, least: int = 1) -> list[int]:
    """`least`, twice that, and so on up to `most`."""
    return [least << power for power in range(most.bit_length()) if least << power <= most]


def grid(adapters: Sequence[AdapterRef], bounds: Bounds) -> Iterator[Case]:
    """Decoding by batch size, by context, by rank with one adapter and with several; reading by length, by
    rank, and by number of prompts."""
    for count in doublings(bounds.sequences):
        yield Case((Part(BASE, 64),) * count)
    for tokens in doublings(bounds.prompt_tokens, least=16):
        yield Case((Part(BASE, tokens),) * min(8, bounds.sequences))
        yield Case((), (Part(BASE, tokens),))
    for refs in by_rank(adapters).values():
        for count in doublings(min(8, bounds.sequences)):
            yield Case((Part(refs[0], 64),) * count)
            yield Case(tuple(Part(ref, 64) for ref in refs[:count]))
        for tokens in doublings(bounds.prompt_tokens, least=32)[::2]:
            yield Case((), (Part(refs[0], tokens),))
        yield Case((), tuple(Part(ref, 32) for ref in refs[:4]))


def draws(adapters: Sequence[AdapterRef], bounds: Bounds, count: int, rng: Random) -> Iterator[Case]:
    """Steps as serving has them: any number of sequences of any adapters (one in eight of the base), and in
    most one to three prompts that are read beside them."""

    def part(most_tokens: int) -> Part:
        ref = BASE if rng.random() < 1 / 8 else rng.choice(adapters)
        return Part(ref, int(2 ** rng.uniform(3, most_tokens.bit_length() - 1)))

    for _ in range(count):
        sequences = int(2 ** rng.uniform(0, (bounds.sequences + 1).bit_length() - 1))
        prompts = rng.choice((0, 1, 1, 1, 2, 3))
        yield Case(
            tuple(part(bounds.prompt_tokens) for _ in range(sequences)),
            tuple(part(bounds.prompt_tokens) for _ in range(prompts)),
        )


def planned(adapters: Sequence[AdapterRef], bounds: Bounds, count: int) -> list[Case]:
    """The grid, then `count` draws, always the same; no case twice."""
    drawn = draws(adapters, bounds, count, Random("cases"))
    return list(dict.fromkeys((*grid(adapters, bounds), *drawn)))
