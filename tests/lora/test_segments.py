"""The table of some of a batch's rows: each under the adapter that it has in the batch."""

from hypothesis import given
from hypothesis import strategies as st

from lora.segments import AdapterWeights, Segment, SegmentTable


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=5),
    st.sets(st.integers(0, 44)),
)
def test_rows_keep_their_adapters(drawn: list[tuple[int, int]], chosen: set[int]) -> None:
    segments: list[Segment] = []
    at = 0
    for number, (gap, count) in enumerate(drawn):
        segments.append(Segment(at + gap, at + gap + count, AdapterWeights(str(number), {})))
        at += gap + count
    rows = sorted(chosen)
    found = SegmentTable(tuple(segments)).of_rows(rows)
    owners = {row: each.adapter for each in segments for row in range(each.start, each.stop)}
    assert all(each.start < each.stop for each in found.segments)
    assert {row: each.adapter for each in found.segments for row in range(each.start, each.stop)} == {
        place: owners[row] for place, row in enumerate(rows) if row in owners
    }
