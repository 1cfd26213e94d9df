"""Whatever is allocated and freed in whatever order: runs never overlap, pages never leak, neighbours coalesce."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.memory.base import PageRun
from lora.memory.pages import RankPages

PAGE = 64


@settings(deadline=None)
@given(num_pages=st.integers(1, 24), moves=st.lists(st.tuples(st.booleans(), st.integers(1, 8 * PAGE))))
def test_runs_are_disjoint_and_nothing_leaks(num_pages: int, moves: list[tuple[bool, int]]) -> None:
    pages = RankPages(num_pages, PAGE)
    held: list[PageRun] = []
    for give_back, size in moves:
        if give_back and held:
            pages.free(held.pop(size % len(held)))
        else:
            run = pages.allocate(size)
            assert (run is None) == (longest_gap(num_pages, held) < -(-size // PAGE))
            if run is not None:
                assert len(run) == -(-size // PAGE)
                assert pages.rows(run).numel() == len(run) * PAGE
                held.append(run)
        taken = [page for run in held for page in range(run.start, run.stop)]
        assert len(taken) == len(set(taken)) == num_pages - pages.free_pages
        assert all(0 <= page < num_pages for page in taken)
    for run in held:
        pages.free(run)
    assert pages.allocate(num_pages * PAGE) == PageRun(0, num_pages), "all free again, as one run"


def longest_gap(num_pages: int, held: list[PageRun]) -> int:
    """The oracle: the longest stretch of pages that no held run has."""
    taken = {page for run in held for page in range(run.start, run.stop)}
    best = current = 0
    for page in range(num_pages):
        current = 0 if page in taken else current + 1
        best = max(best, current)
    return best


def test_a_page_given_back_twice_is_a_bug_that_shows() -> None:
    pages = RankPages(4, PAGE)
    run = pages.allocate(2 * PAGE)
    assert run is not None
    pages.free(run)
    with pytest.raises(AssertionError, match="free already"):
        pages.free(run)


@pytest.mark.parametrize(("num_pages", "page_bytes"), [(0, 64), (4, 0), (4, 100)])
def test_an_arena_that_cannot_be_is_refused(num_pages: int, page_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages={num_pages}, page_bytes={page_bytes}"):
        RankPages(num_pages, page_bytes)
