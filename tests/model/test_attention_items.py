"""How attention is cut into items: whatever the step, every row sees each of its tokens once, and no other."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.triton.items import MOST_SHARES, Items, lay_items, most_narrow_items
from tests.chance import examples

PIECES = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 64, 200]), st.integers(0, 9000)), min_size=1, max_size=8
)
WINDOWS = st.sampled_from([None, 1, 100, 700])


def lay(pieces: list[tuple[int, int]], window: int | None, tile_rows: int = 32) -> Items:
    """Pieces of (rows, tokens before them)."""
    rows, contexts = [r for r, _ in pieces], [r + before for r, before in pieces]
    return lay_items(rows, contexts, window, tile_rows)


@settings(max_examples=examples(60))
@given(pieces=PIECES, window=WINDOWS)
def test_every_row_sees_its_tokens_once(pieces: list[tuple[int, int]], window: int | None) -> None:
    """Tokens of an item beyond a row's own position or window are hidden by the kernel, and not counted here."""
    laid = lay(pieces, window)
    seen = {row: [] for row in range(sum(rows for rows, _ in pieces))}
    for first_row, rows, position, first, stop, sequence, _, _ in np.concatenate(
        [laid.narrow, laid.wide]
    ).tolist():
        assert first < stop
        before_rows = sum(r for r, _ in pieces[:sequence])
        assert position == pieces[sequence][1] + first_row - before_rows
        for i in range(rows):
            low = 0 if window is None else position + i - window + 1
            seen[first_row + i].append((max(first, low), min(stop, position + i + 1)))
    row = 0
    for rows, before in pieces:
        for position in range(before, before + rows):
            runs = sorted((a, b) for a, b in seen[row] if a < b)
            assert runs[0][0] == (0 if window is None else max(0, position - window + 1))
            assert runs[-1][1] == position + 1
            assert all(end == begin for (_, end), (begin, _) in pairwise(runs))
            row += 1


@settings(max_examples=examples(60))
@given(pieces=PIECES, window=WINDOWS)
def test_every_share_has_a_slot_of_its_own_and_is_merged(
    pieces: list[tuple[int, int]], window: int | None
) -> None:
    laid = lay(pieces, window)
    written = {}
    whole = set()
    for first_row, rows, _, first, _, _, slot, _ in np.concatenate([laid.narrow, laid.wide]).tolist():
        for i in range(rows):
            if slot < 0:
                whole.add(first_row + i)
            else:
                assert slot + i not in written
                written[slot + i] = (first_row + i, first)
    assert all(slot < laid.slots for slot in written)
    merged = {}
    for row, slot, apart, shares in laid.merges.tolist():
        assert shares <= MOST_SHARES
        parts = [written.pop(slot + k * apart) for k in range(shares)]
        assert {owner for owner, _ in parts} == {row}
        assert [first for _, first in parts] == sorted(first for _, first in parts)
        merged[row] = shares
    assert not written
    assert whole.isdisjoint(merged)
    assert len(whole) + len(merged) == sum(rows for rows, _ in pieces)


@settings(max_examples=examples(40))
@given(pieces=PIECES, window=WINDOWS, which=st.integers(0, 7))
def test_a_sequence_is_cut_alike_alone_and_in_company(
    pieces: list[tuple[int, int]], window: int | None, which: int
) -> None:
    which %= len(pieces)
    alone, together = lay([pieces[which]], window), lay(pieces, window)

    def cuts(laid: Items, sequence: int) -> list[list[int]]:
        items = np.concatenate([laid.narrow, laid.wide])
        return sorted(items[items[:, 5] == sequence][:, 1:5].tolist())

    assert cuts(alone, 0) == cuts(together, which)


@settings(max_examples=examples(40))
@given(contexts=st.lists(st.integers(1, 40_000), min_size=1, max_size=10), window=WINDOWS)
def test_reserved_room_suffices(contexts: list[int], window: int | None) -> None:
    laid = lay([(1, context - 1) for context in contexts], window)
    room = most_narrow_items(len(contexts), max(contexts))
    assert len(laid.narrow) <= room
    assert laid.slots <= room
    assert len(laid.merges) <= len(contexts)


def test_longest_first() -> None:
    laid = lay([(200, 0), (200, 5000)], None)
    lengths = laid.wide[:, 4] - laid.wide[:, 3]
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
