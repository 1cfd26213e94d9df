"""What the LoRA kernels have to do in a step, as one array of words: written on the host when the batch's membership
changes, read by kernels whose grid never does. Knows neither Triton nor a device.

    words: HEADER counts | chunks, ENTRY words each | shrink items of each group, ENTRY words each
    entry: address of the adapter's table, first row, rows | tile << 32, first element of its h

A chunk is up to `block_rows` rows of one adapter; an expanding kernel takes a chunk and a tile of columns. A shrink
item is a chunk and one tile of `block_rank` rows of the group's stacked A. So the work of an adapter follows from its
own ranks and rows, and nobody else's. Chunks with adapters come first, the widest before the narrower, so that a
strided deal of the work leaves no heavy piece for the end; chunks of the base follow, under a table of rank 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.target_modules import SiteGroup

HEADER = 2 + 2 * len(SiteGroup)  # adapters' chunks, all chunks, each group's items, each group's first word
ENTRY = 4
GROUPS = tuple(SiteGroup)

Words = np.ndarray
"""[n] int64"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start:stop` of the batch under the adapter whose table is at address `table`.

    Its stacked A has at most `ranks[g]` rows at any layer's group g.
    """

    start: int
    stop: int
    table: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A step's words, and how many elements of h it needs."""

    words: Words
    h_elements: int

    @property
    def adapter_chunks(self) -> int:
        """Chunks of rows with an adapter."""
        return int(self.words[0])

    @property
    def chunks(self) -> Words:
        """View all chunks, [chunks, ENTRY]."""
        return self.words[HEADER : HEADER + ENTRY * int(self.words[1])].reshape(-1, ENTRY)

    def items(self, group: SiteGroup) -> Words:
        """View the group's shrink items, [items, ENTRY]."""
        number = GROUPS.index(group)
        count, first = int(self.words[2 + number]), int(self.words[2 + len(GROUPS) + number])
        return self.words[first : first + ENTRY * count].reshape(-1, ENTRY)


def plan_work(adapted: Sequence[Rows], rows: int, base_table: int, block_rows: int, block_rank: int) -> Work:
    """The work of a batch of `rows` rows; `adapted` are disjoint and ascending, the base has what is between them."""
    starts = np.array([each.start for each in adapted], dtype=np.int64)
    stops = np.array([each.stop for each in adapted], dtype=np.int64)
    tables = np.array([each.table for each in adapted], dtype=np.int64)
    ranks = np.array([each.ranks for each in adapted], dtype=np.int64).reshape(-1, len(GROUPS))
    order = np.argsort(-ranks.max(axis=1, initial=0), kind="stable")

    chunks, owners = _chunks(starts[order], stops[order], tables[order], block_rows)
    h_sizes = chunks[:, 2] * ranks[order].max(axis=1, initial=0)[owners]
    chunks[:, 3] = np.cumsum(h_sizes) - h_sizes
    edges = np.concatenate(([0], stops)), np.concatenate((starts, [rows]))
    base, _ = _chunks(*edges, np.full(len(stops) + 1, base_table), block_rows)
    items = [_items(chunks, -(-ranks[order][owners, g] // block_rank)) for g in range(len(GROUPS))]
    return Work(_joined(chunks, base, items), int(h_sizes.sum()))


def _chunks(starts: Words, stops: Words, tables: Words, block_rows: int) -> tuple[Words, Words]:
    """List the chunks of every run of rows, [n, ENTRY] with h still at 0, and the run of each, [n]."""
    counts = -(-(stops - starts) // block_rows)
    owners, number = _dealt(counts)
    first = starts[owners] + number * block_rows
    lengths = np.minimum(block_rows, stops[owners] - first)
    return np.stack((tables[owners], first, lengths, np.zeros_like(first)), axis=1), owners


def _items(chunks: Words, tiles: Words) -> Words:
    """Each chunk as often as it has tiles, with the tile's number."""
    owners, number = _dealt(tiles)
    items = chunks[owners]
    items[:, 2] |= number << 32
    return items


def _dealt(counts: Words) -> tuple[Words, Words]:
    """Owner i, counts[i] times, and beside it 0, 1, 2, ... for each owner."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _joined(chunks: Words, base: Words, items: list[Words]) -> Words:
    parts = [chunks, base, *items]
    ends = HEADER + np.cumsum([part.size for part in parts])
    counts = [len(chunks), len(chunks) + len(base), *map(len, items)]
    header = np.array([*counts, *ends[1:-1]], dtype=np.int64)
    return np.concatenate((header, *(part.ravel() for part in parts)))
