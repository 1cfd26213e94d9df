"""A sequence's own rules: which tokens its slices carry."""

from scheduler.limits import StepLimits
from scheduler.plan import PENDING, SliceOutput
from scheduler.sequence import Sequence
from tests.scheduler.rig import request


def _drawn(*token_ids: int) -> Sequence:
    """A sequence with a prompt of one token, 7, that has drawn these."""
    sequence = Sequence(request("a", [7]), 0, block_size=4, max_model_len=100)
    sequence.hold((0, 1))
    for token_id in token_ids:
        sequence.commit(sequence.take(limit=8), SliceOutput(token_id))
    return sequence


def test_only_prompts_of_one_length_share_blocks_beyond_a_dynamic_ropes_length() -> None:
    limits = StepLimits(1, 1, 100, dynamic_rope_tokens=8)
    first, longer, short = (request("a", list(range(length))) for length in (9, 12, 8))
    seeds = [
        Sequence(each, 0, 4, 100, limits.rotated_by(len(each.prompt_token_ids))).digests(1)[0]
        for each in (first, first, longer, short)
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3
    assert seeds[3] == Sequence(short, 0, 4, 100).digests(1)[0]


def test_drawn_tokens_are_recomputed_in_order_by_chunks_of_any_size() -> None:
    for limit, chunks in ((1, [(7,), (5,), (6,), (8,)]), (3, [(7, 5, 6), (8,)])):
        sequence = _drawn(5, 6, 8)
        sequence.lose_blocks()
        sequence.hold((0, 1))
        assert [sequence.take(limit).token_ids for _ in chunks] == chunks


def test_the_token_that_is_still_being_drawn_is_pending() -> None:
    sequence = _drawn(5)
    assert [sequence.take(limit=8).token_ids for _ in range(2)] == [(5,), (PENDING,)]
