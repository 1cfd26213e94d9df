"""Cut a step's attention into items for the kernels: integers in, integers out.

A sequence's items are a function of its own rows and tokens, never of the batch, and so are the sums that they make:
a row's result is the same, bit for bit, alone and in company.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ITEM_WORDS = 8
MERGE_WORDS = 4
MOST_SHARES = 32  # of one row; longer sequences are split into longer runs
_TILE_TOKENS = 64  # runs are multiples of it
_ONE_ROW_TOKENS = 256  # a thousand are four runs: enough programs for few sequences, little to merge
_FEW_ROWS_TOKENS = 1024
_FEW_TILES = 4
"""A piece of a prompt with no more tiles splits its tokens too: its tiles alone would leave a GPU idle."""


@dataclass(frozen=True, slots=True)
class Items:
    """Work for one window.

    narrow: [n, 8] int32, items of a single row. wide: [m, 8], those of prompts' tiles, longest first. merges: [r, 4],
    the rows whose tokens are split; `slots` is how many shares those have together.
    """

    narrow: NDArray[np.int32]
    wide: NDArray[np.int32]
    merges: NDArray[np.int32]
    slots: int


def most_narrow_items(rows: int, tokens: int) -> int:
    """The most items that `rows` sequences of one row and up to `tokens` tokens each can have."""
    return rows * max(1, min(MOST_SHARES, -(-tokens // _ONE_ROW_TOKENS)))


def lay_items(
    query_lens: Sequence[int], context_lens: Sequence[int], window: int | None, tile_rows: int
) -> Items:
    """Cut a step of S sequences (see ForwardBatch) into items; a wide one holds up to `tile_rows` rows."""
    rows, stop = np.array(query_lens, dtype=np.int64), np.array(context_lens, dtype=np.int64)
    if len(rows) == rows.sum():
        return _lay_single_rows(stop, window)
    tiles = _tiles(rows, stop, window, tile_rows)
    shares, run = _shares(tiles, rows, tile_rows)
    slots_of = np.where(shares > 1, shares * tiles.rows, 0)
    slot = np.cumsum(slots_of) - slots_of
    items = _items(tiles, shares, run, slot)
    alone = rows[items[:, 5]] == 1
    wide = items[~alone]
    return Items(
        narrow=items[alone],
        wide=wide[np.argsort(wide[:, 3] - wide[:, 4], kind="stable")],
        merges=_merges(tiles, shares, slot),
        slots=int(slots_of.sum()),
    )


def _lay_single_rows(stop: Integers, window: int | None) -> Items:
    """A step of decode alone, the same items in a third of the time: slots are numbered as the items are."""
    first = np.zeros_like(stop) if window is None else np.maximum(0, stop - window)
    shares, run = _cut(stop - first, np.full_like(stop, _ONE_ROW_TOKENS))
    after = np.cumsum(shares)
    number, sequence = np.arange(int(after[-1])), np.repeat(np.arange(len(stop)), shares)
    begin = (first - (after - shares) * run)[sequence] + number * run[sequence]
    items = np.zeros((len(number), ITEM_WORDS), dtype=np.int32)
    items[:, 0] = items[:, 5] = sequence
    items[:, 1] = 1
    items[:, 2] = (stop - 1)[sequence]
    items[:, 3] = begin
    items[:, 4] = np.minimum(stop[sequence], begin + run[sequence])
    items[:, 6] = np.where((shares > 1)[sequence], number, -1)
    split = np.flatnonzero(shares > 1)
    merges = np.ones((len(split), MERGE_WORDS), dtype=np.int32)
    merges[:, 0], merges[:, 1], merges[:, 3] = split, (after - shares)[split], shares[split]
    return Items(items, items[:0], merges, len(items))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Adjacent rows of one sequence, each array [t]: which sequence, first row in the batch, rows, the first row's
    position, and the tokens `first .. stop - 1` that any of the rows sees."""

    sequence: Integers
    first_row: Integers
    rows: Integers
    position: Integers
    first: Integers
    stop: Integers


def _tiles(rows: Integers, stop: Integers, window: int | None, tile_rows: int) -> _Tiles:
    count = -(-rows // tile_rows)
    sequence = np.repeat(np.arange(len(rows)), count)
    before = _counting(count) * tile_rows  # rows of the sequence in earlier tiles
    held = np.minimum(tile_rows, rows[sequence] - before)
    position = (stop - rows)[sequence] + before
    first = np.zeros_like(position) if window is None else np.maximum(0, position - window + 1)
    return _Tiles(
        sequence, (np.cumsum(rows) - rows)[sequence] + before, held, position, first, position + held
    )


def _shares(tiles: _Tiles, rows: Integers, tile_rows: int) -> tuple[Integers, Integers]:
    """Into how many runs of tokens each tile is split, and how long they are."""
    of = rows[tiles.sequence]
    tokens = tiles.stop - tiles.first
    aim = np.where(of == 1, _ONE_ROW_TOKENS, np.where(of <= _FEW_TILES * tile_rows, _FEW_ROWS_TOKENS, tokens))
    return _cut(tokens, aim)


def _cut(tokens: Integers, aim: Integers) -> tuple[Integers, Integers]:
    """Into how many runs of about `aim` each of `tokens` is cut, and how long they are, but for the last."""
    wanted = np.clip(-(-tokens // aim), 1, MOST_SHARES)
    run = -(-tokens // (wanted * _TILE_TOKENS)) * _TILE_TOKENS
    return -(-tokens // run), run


def _items(tiles: _Tiles, shares: Integers, run: Integers, slot: Integers) -> NDArray[np.int32]:
    tile = np.repeat(np.arange(len(shares)), shares)
    share = _counting(shares)
    first = tiles.first[tile] + share * run[tile]
    slots = np.where(shares[tile] > 1, slot[tile] + share * tiles.rows[tile], -1)
    columns = (
        tiles.first_row[tile],
        tiles.rows[tile],
        tiles.position[tile],
        first,
        np.minimum(tiles.stop[tile], first + run[tile]),
        tiles.sequence[tile],
        slots,
        np.zeros_like(tile),
    )
    return np.stack(columns, axis=1).astype(np.int32)


def _merges(tiles: _Tiles, shares: Integers, slot: Integers) -> NDArray[np.int32]:
    split = np.flatnonzero(shares > 1)
    held = tiles.rows[split]
    tile, row = np.repeat(split, held), _counting(held)
    columns = (tiles.first_row[tile] + row, slot[tile] + row, tiles.rows[tile], shares[tile])
    return np.stack(columns, axis=1).astype(np.int32)


def _counting(counts: Integers) -> Integers:
    """Return 0 .. count - 1 for each count, one after another."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
