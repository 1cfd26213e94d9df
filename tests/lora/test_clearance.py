"""Pages that are emptied for an adapter that has waited too long: which, for whom, and when they are had."""

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, Usage
from lora.memory.clearance import Clearance
from lora.memory.page_allocator import PageAllocator
from scheduler.residency import CheapestWindow

CLAIMS = st.sampled_from(tuple(Claim))


def occupant(start: int, stop: int, claim: Claim = Claim.RETAINED, uses: float = 1.0) -> Occupant:
    return Occupant(PageRun(start, stop), claim, Usage(uses, used_step=100, placed_step=1), 1.0)


def clearing(pages: int, num_pages: int, occupants: Sequence[Occupant], running: str = "") -> Clearance:
    made = Clearance(CheapestWindow())
    request = PageRequest(pages, num_pages, Force.CLEAR, 100)
    made.go_on("cold", frozenset(running.split()), request, occupants)
    return made


def test_the_window_is_where_the_least_used_lie_whatever_runs_there() -> None:
    hot, cold = occupant(0, 4, Claim.PINNED, uses=9.0), occupant(4, 8, Claim.PINNED, uses=1.0)
    assert clearing(4, 8, [hot, cold]).window == PageRun(4, 8)


def test_the_window_stays_where_it_is_until_its_adapter_has_pages() -> None:
    both = [occupant(0, 4, uses=1.0), occupant(4, 8, uses=9.0)]
    made = clearing(4, 8, both)
    turned = [occupant(0, 4, uses=9.0), occupant(4, 8, uses=1.0)]
    made.go_on("cold", frozenset(), PageRequest(4, 8, Force.CLEAR, 200), turned)
    assert made.window == PageRun(0, 4)
    made.go_on("other", frozenset(), PageRequest(4, 8, Force.CLEAR, 200), turned)
    assert (made.digest, made.window) == ("other", PageRun(4, 8))
    made.stop()
    assert not made.is_inside(PageRun(0, 8))


def test_what_runs_stays_until_it_runs_no_more_and_nobody_else_gets_its_place() -> None:
    made = clearing(4, 8, [occupant(0, 4), occupant(4, 8, uses=9.0)], running="a")
    assert [made.may_go(digest, PageRun(0, 4)) for digest in ("a", "b")] == [False, True]
    assert not made.may_go("b", PageRun(4, 8)), "it is outside"
    assert (made.kept_from("b"), made.kept_from("cold")) == (PageRun(0, 4), None)


def test_a_window_that_the_arena_has_no_more_is_chosen_again() -> None:
    made = clearing(4, 8, [occupant(0, 4, uses=9.0), occupant(4, 8)])
    made.go_on("cold", frozenset(), PageRequest(4, 6, Force.CLEAR, 100), [occupant(0, 4, uses=9.0)])
    assert made.window == PageRun(0, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), CLAIMS), max_size=8), st.integers(1, 12))
def test_there_is_a_window_for_whatever_fits_the_arena(
    parts: list[tuple[int, bool, Claim]], pages: int
) -> None:
    """So what waits does not wait for luck."""
    occupants: list[Occupant] = []
    at = 0
    for length, taken, claim in parts:
        if taken:
            occupants.append(occupant(at, at + length, claim))
        at += length
    made = clearing(pages, at, occupants)
    assert (made.window is None) == (pages > at)
    seen = made.without("other", occupants)
    if made.window is not None:
        assert len(made.window) == pages
        assert any(each.claim is Claim.PINNED and len(each.run) >= pages for each in seen)
    ends = sorted((each.run for each in seen), key=lambda run: run.start)
    assert all(not one.overlaps(following) for one, following in itertools.pairwise(ends))


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 12), st.integers(1, 8), st.integers(1, 6))
def test_pages_that_are_kept_for_another_are_not_handed_out(
    held: list[int], start: int, length: int, count: int
) -> None:
    pages, kept = PageAllocator(20), PageRun(start, start + length)
    for each in held[::2]:
        pages.allocate(each)
    free = pages.free_pages
    run = pages.allocate(count, kept)
    assert run is None or (not run.overlaps(kept) and len(run) == count)
    assert pages.free_pages == free - (count if run is not None else 0)


def test_very_pages_are_taken_only_if_all_are_free() -> None:
    pages = PageAllocator(8)
    assert pages.take(PageRun(2, 5)) == PageRun(2, 5)
    assert pages.take(PageRun(4, 6)) is None
    assert pages.allocate(3) == PageRun(5, 8)
    assert pages.take(PageRun(0, 2)) == PageRun(0, 2)
    assert pages.free_pages == 0
    assert pages.take(PageRun(0, 1)) is None
