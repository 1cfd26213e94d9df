"""The words that the LoRA kernels work from: every row once, and no adapter's work follows from another's rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora.ops.triton.work import GROUPS, HEADER, Rows, Work, plan_work
from lora.target_modules import SiteGroup

BASE = 99  # the address of the base's table


def rows(start: int, count: int, table: int, rank: int) -> Rows:
    """An adapter of one rank at all seven sites."""
    return Rows(start, start + count, table, tuple(rank * len(group.sites) for group in SiteGroup))


def lengths(entries: np.ndarray) -> np.ndarray:
    return entries[:, 2] & 0xFFFFFFFF


def own(work: Work, table: int) -> dict[str, object]:
    """The table's chunks and items: first row, rows and tile of each, in order; where h lies is of no account."""
    chosen = {"chunks": work.chunks} | {group.name: work.items(group) for group in GROUPS}
    return {name: entries[entries[:, 0] == table][:, 1:3].tolist() for name, entries in chosen.items()}


BATCHES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 70), st.sampled_from([1, 5, 8, 24, 37, 128])), max_size=8
)


def batch(drawn: list[tuple[int, int, int]]) -> tuple[list[Rows], int]:
    """Adapters of drawn (rows of the base before them, rows, rank), and the rows of all, with three more."""
    adapted, at = [], 0
    for table, (gap, count, rank) in enumerate(drawn):
        adapted.append(rows(at + gap, count, table, rank))
        at += gap + count
    return adapted, at + 3


@given(drawn=BATCHES, block_rows=st.sampled_from([1, 16, 64]))
def test_every_row_is_in_one_chunk_of_its_own_adapter(
    drawn: list[tuple[int, int, int]], block_rows: int
) -> None:
    adapted, count = batch(drawn)
    work = plan_work(adapted, count, BASE, block_rows, 16)
    owners = np.full(count, BASE)
    for each in adapted:
        owners[each.start : each.stop] = each.table
    found = np.full(count, -1)
    for (table, first, _, _), length in zip(work.chunks, lengths(work.chunks), strict=True):
        assert 1 <= length <= block_rows
        assert (found[first : first + length] == -1).all()
        found[first : first + length] = table
    assert (found == owners).all()
    assert (work.chunks[: work.adapter_chunks, 0] != BASE).all()
    assert (work.chunks[work.adapter_chunks :, 0] == BASE).all()


@given(drawn=BATCHES, block_rank=st.sampled_from([16, 64]))
def test_items_are_each_chunk_with_each_tile_of_its_own_rank(
    drawn: list[tuple[int, int, int]], block_rank: int
) -> None:
    adapted, count = batch(drawn)
    work = plan_work(adapted, count, BASE, 16, block_rank)
    chunks = work.chunks[: work.adapter_chunks]
    for number, group in enumerate(GROUPS):
        want = []
        for chunk in chunks:
            ranks = adapted[chunk[0]].ranks[number]
            for tile in range(-(-ranks // block_rank)):
                want.append([*chunk[:2], chunk[2] | tile << 32, chunk[3]])
        assert work.items(group).tolist() == want


@given(drawn=BATCHES)
def test_each_row_has_its_own_place_in_h(drawn: list[tuple[int, int, int]]) -> None:
    adapted, count = batch(drawn)
    work = plan_work(adapted, count, BASE, 16, 16)
    chunks = work.chunks[: work.adapter_chunks]
    taken = np.zeros(work.h_elements, dtype=int)
    for (table, _, _, h_at), length in zip(chunks, lengths(chunks), strict=True):
        taken[h_at : h_at + length * max(adapted[table].ranks)] += 1
    assert (taken == 1).all()


@given(drawn=BATCHES)
def test_a_wide_adapter_changes_nobody_elses_work(drawn: list[tuple[int, int, int]]) -> None:
    adapted, count = batch(drawn)
    alone = plan_work(adapted, count, BASE, 16, 16)
    company = plan_work([*adapted, rows(count, 5, 77, 128)], count + 5, BASE, 16, 16)
    for table in [*(each.table for each in adapted), BASE]:
        assert own(company, table) == own(alone, table)
    added = company.items(SiteGroup.QKV)[company.items(SiteGroup.QKV)[:, 0] == 77]
    assert len(added) == 3 * 128 // 16


def test_base_rows_are_no_items() -> None:
    work = plan_work([], 300, BASE, 64, 16)
    assert work.adapter_chunks == 0
    assert work.h_elements == 0
    assert len(work.chunks) == 5
    assert len(work.words) == HEADER + 4 * 5


def test_the_widest_come_first() -> None:
    """So that programs that deal the chunks out in turn have no heavy one left at the end."""
    adapted = [rows(at, 1, at, rank) for at, rank in enumerate((8, 128, 16, 64, 8))]
    assert plan_work(adapted, 5, BASE, 16, 16).chunks[:, 0].tolist() == [1, 3, 2, 0, 4]
