"""Blocks under activated LoRAs: two have one digest exactly if their K/V are the same."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from lora.adapter import BASE, AdapterRef
from scheduler.sequence import Sequence
from tests.chance import examples
from tests.scheduler.device import content
from tests.scheduler.rig import ACTIVATED, ADAPTERS, request

ASKED = (BASE, ADAPTERS[0], *ACTIVATED)
token_ids = st.one_of(*(st.lists(st.integers(least, 3), max_size=10) for least in (1, 2)))
cases = st.tuples(st.sampled_from(ASKED), token_ids.filter(len), token_ids)


def blocks(
    case: tuple[AdapterRef, list[int], list[int]], size: int
) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Yield the digest and the K/V of each full block of a prompt and the tokens drawn after it."""
    adapter, prompt, drawn = case
    asked = request("r", prompt, adapter)
    sequence, before, context = Sequence(asked, 0, size, 64), 0, list[int]()
    sequence.output_token_ids += drawn
    for position, token_id in enumerate((*prompt, *drawn)):
        before = content(adapter if position >= asked.adapted_from else BASE, before, token_id)
        context.append(before)
    for at, digest in enumerate(sequence.digests(len(context) // size)):
        yield digest, tuple(context[at * size : (at + 1) * size])


@settings(deadline=None, derandomize=True, max_examples=examples(300))
@given(st.lists(cases, min_size=2, max_size=6), st.sampled_from((1, 2, 4)))
def test_equal_digests_mean_equal_kv_and_equal_kv_equal_digests(
    asked: list[tuple[AdapterRef, list[int], list[int]]], size: int
) -> None:
    found = {pair for case in asked for pair in blocks(case, size)}
    assert len({digest for digest, _ in found}) == len(found) == len({kv for _, kv in found})


def test_an_invocation_that_is_whole_only_in_the_next_block_changes_this_one() -> None:
    """The first four tokens are the same, and the adapter acts from the second or from the fourth of them on."""
    cases = [(ACTIVATED[1], [1, 2, 3, 2, end], list[int]()) for end in (1, 3)]
    (one, one_kv), (other, other_kv) = (next(blocks(case, 4)) for case in cases)
    assert one_kv != other_kv
    assert one != other
