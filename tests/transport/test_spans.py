"""Laying spans over spans: every byte once, in order, no piece across a border."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from transport.memory.spans import Span, batches, pair

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def spread(lengths: list[int], gap: int) -> list[Span]:
    """Spans of these lengths, `gap` apart."""
    spans: list[Span] = []
    at = 0
    for nbytes in lengths:
        spans.append(Span(at, nbytes))
        at += nbytes + gap
    return spans


def addresses(spans: list[Span]) -> list[int]:
    return [span.address + index for span in spans for index in range(span.nbytes)]


@settings(deadline=None)
@given(lengths=LENGTHS, cuts=st.lists(st.integers(1, 999), max_size=20), most=st.integers(1, 60))
def test_every_byte_goes_where_a_copy_through_one_buffer_would_put_it(
    lengths: list[int], cuts: list[int], most: int
) -> None:
    total = sum(lengths)
    edges = sorted({0, total, *(cut % total for cut in cuts)})
    source = spread(lengths, gap=3)
    target = spread([stop - start for start, stop in pairwise(edges)], gap=5)
    pieces = list(pair(source, target, most))
    assert all(0 < nbytes <= most for _, _, nbytes in pieces)
    moved = [(one + index, other + index) for one, other, nbytes in pieces for index in range(nbytes)]
    assert moved == list(zip(addresses(source), addresses(target), strict=True))


@settings(deadline=None)
@given(lengths=LENGTHS, most_bytes=st.integers(1, 60), most_pieces=st.integers(1, 7))
def test_batches_are_the_same_pieces_and_small_enough(
    lengths: list[int], most_bytes: int, most_pieces: int
) -> None:
    source, target = spread(lengths, gap=3), spread(list(reversed(lengths)), gap=5)
    groups = list(batches(source, target, most_bytes, most_pieces))
    assert all(0 < len(group) <= most_pieces for group in groups)
    assert all(sum(piece.nbytes for piece in group) <= most_bytes for group in groups)
    assert [piece for group in groups for piece in group] == list(pair(source, target, most_bytes))


def test_a_large_piece_goes_alone_and_small_ones_together() -> None:
    spans = spread([25, 1, 10, 3, 3, 3], gap=1)
    sizes = [[piece.nbytes for piece in group] for group in batches(spans, spans, 10, 100)]
    assert sizes == [[10], [10], [5, 1], [10], [3, 3, 3]]
