"""Laying spans over spans: every byte once, in order, no piece across a border."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from transport.paths.ucx_read import Span, pair

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def spread(lengths: list[int], gap: int) -> list[Span]:
    """Spans of these lengths, `gap` apart."""
    spans, at = [], 0
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
