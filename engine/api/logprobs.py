"""Log-probabilities on the wire, as far as completions and chat agree about them."""

from collections.abc import Sequence

from engine.text import TextCodec
from scheduler.plan import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    """`logprob` as JSON can carry it."""
    return max(logprob, LOWEST)


def prompt_logprobs_entries(
    entries: Sequence[TokenLogprob], prompt: Sequence[int], codec: TextCodec
) -> list[dict[str, object] | None]:
    """One entry per token of `prompt`, the first null: by token id, the token itself and the most likely
    ones."""
    assert len(entries) == len(prompt) - 1, "the engine scores every prompt token but the first"
    return [None, *(_entry(entry, codec) for entry in entries)]


def _entry(entry: TokenLogprob, codec: TextCodec) -> dict[str, object]:
    ranked = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
    ranked[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {"logprob": finite(value), "rank": rank, "decoded_token": codec.token_text(token_id)}
        for token_id, (value, rank) in ranked.items()
    }
