"""Whatever is allocated and freed in whatever order: runs never overlap, pages never leak, neighbours coalesce."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.memory.pages import PageRun, RankPages
from lora.memory.residency import Occupant, cheapest_window

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


@st.composite
def arenas(draw: st.DrawFn) -> tuple[int, int, list[Occupant]]:
    """An arena's size, the pages wanted, and who sits where."""
    num_pages = draw(st.integers(1, 20))
    cuts = sorted(draw(st.sets(st.integers(0, num_pages), max_size=10)))
    losses = st.none() | st.tuples(st.integers(0, 1), st.integers(1, 9).map(float))
    occupants = [
        Occupant(PageRun(start, stop), draw(losses))
        for start, stop in itertools.pairwise(cuts)
        if draw(st.booleans())
    ]
    return num_pages, draw(st.integers(1, num_pages)), occupants


@settings(deadline=None)
@given(arenas())
def test_the_cheapest_window_is_the_cheapest_of_all(arena: tuple[int, int, list[Occupant]]) -> None:
    num_pages, needed, occupants = arena

    def price(window: PageRun) -> tuple[int, float] | None:
        inside = [o.loss for o in occupants if o.run.overlaps(window)]
        known = [loss for loss in inside if loss is not None]
        return (sum(k[0] for k in known), sum(k[1] for k in known)) if len(known) == len(inside) else None

    every = [PageRun(start, start + needed) for start in range(num_pages - needed + 1)]
    prices = [found for window in every if (found := price(window)) is not None]
    best = cheapest_window(num_pages, needed, occupants)
    assert (best is None) == (not prices)
    if best is not None:
        assert best.stop <= num_pages
        assert price(best) == min(prices)
