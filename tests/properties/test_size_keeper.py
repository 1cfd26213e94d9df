"""How many nodes are wanted, whatever is needed when: within bounds, soon more, late fewer, and never to and fro."""

from itertools import pairwise
from math import ceil

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cluster.coordinator.node_need import NeededNodes
from scheduler.cluster.coordinator.size_keeper import (
    REMEMBERED_S,
    SHRINK_MARGIN,
    SizeBounds,
    SizeKeeper,
    SizeLook,
)

EVERY_S = 2.0
BOUNDS = SizeBounds(1, 8, grow_after_s=10.0, shrink_after_s=60.0)
NOISE = 0.17  # less than what the margin leaves between growing and shrinking
bounds = st.tuples(st.integers(1, 5), st.integers(0, 5)).map(
    lambda pair: SizeBounds(pair[0], pair[0] + pair[1], 10.0, 60.0)
)
looks = st.builds(
    SizeLook,
    present=st.integers(0, 10),
    running=st.integers(0, 10),
    need=st.builds(NeededNodes, st.integers(1, 12)),
    spares_one=st.booleans(),
    refusing_at=st.none() | st.floats(0, 1e5),
    tokens_per_s=st.floats(0, 1e4),
)


seeds = st.integers(0, 1 << 32)


def noisy(work: float, count: int, seed: int) -> list[float]:
    """Return a work that changes by chance."""
    return (work * np.random.default_rng(seed).uniform(1 - NOISE, 1 + NOISE, count)).tolist()


def look_of(
    keeper: SizeKeeper,
    work: float,
    refusing_at: float | None = None,
    present: int | None = None,
    running: int | None = None,
) -> SizeLook:
    """Return what is seen where `work` fills so many nodes."""
    spares = work <= SHRINK_MARGIN * (keeper.wanted - 1)
    there = keeper.wanted if present is None else present
    return SizeLook(
        there,
        keeper.wanted if running is None else running,
        NeededNodes(max(1, ceil(work))),
        spares,
        refusing_at,
        100 * work,
    )


def history(keeper: SizeKeeper, works: list[float], begin_s: float = 0.0) -> list[int]:
    """Return how many were wanted after each look."""
    return [
        keeper.decide(look_of(keeper, work), BOUNDS, begin_s + EVERY_S * at) for at, work in enumerate(works)
    ]


@given(bounds, st.integers(1, 12), st.lists(looks, max_size=200))
def test_the_number_stays_within_bounds_and_shrinks_by_one_after_long_enough(
    within: SizeBounds, begin: int, seen: list[SizeLook]
) -> None:
    keeper, before, changed_s = SizeKeeper(begin, 0.0), begin, 0.0
    for at, look in enumerate(seen):
        now = EVERY_S * at
        wanted = keeper.decide(look, within, now)
        assert within.lowest <= wanted <= within.highest
        if wanted < before and keeper.last.reason != "bounds":
            assert wanted == before - 1
            assert now - changed_s >= within.shrink_after_s
            assert look.present >= min(before, look.running), "nodes that are missing are not to be missed"
        if wanted > before and keeper.last.reason == "load":
            assert now - changed_s >= within.grow_after_s
            assert wanted <= look.need.nodes
        if wanted != before:
            before, changed_s = wanted, now


@given(st.floats(0.1, 8.0), st.integers(1, 8), seeds)
def test_under_a_steady_load_with_noise_it_goes_one_way_only(work: float, begin: int, seed: int) -> None:
    keeper = SizeKeeper(begin, 0.0)
    wanted = [begin, *history(keeper, noisy(work, 300, seed))]
    steps = {after > before for before, after in pairwise(wanted) if after != before}
    assert len(steps) <= 1, wanted


@given(st.floats(0.1, 8.0), st.integers(1, 8))
def test_in_time_there_are_enough_and_not_one_too_many(work: float, begin: int) -> None:
    keeper = SizeKeeper(begin, 0.0)
    wanted = history(keeper, [work] * 300)[-1]
    assert work <= wanted
    assert wanted == 1 or work > SHRINK_MARGIN * (wanted - 1)


@given(st.floats(0.1, 8.0), seeds)
def test_another_keeper_that_begins_with_as_many_goes_on_the_same_way(work: float, seed: int) -> None:
    first = SizeKeeper(4, 0.0)
    wanted = [4, *history(first, noisy(work, 100, seed))]
    second = SizeKeeper(first.wanted, 1000.0)
    wanted += history(second, noisy(work, 100, seed + 1), 1000.0)
    assert len({after > before for before, after in pairwise(wanted) if after != before}) <= 1, wanted


def test_a_need_that_passes_soon_changes_nothing_and_of_one_that_lasts_the_least_counts() -> None:
    keeper = SizeKeeper(1, 0.0)
    assert set(history(keeper, [5.0, 5.0, 5.0, 0.5] * 10)) == {1}
    assert history(SizeKeeper(1, 0.0), [7.0, 2.5, 7.0, 7.0, 7.0, 7.0])[-1] == 3


def test_refusals_bring_one_node_at_a_time_and_wait_for_it() -> None:
    keeper = SizeKeeper(2, 0.0)
    assert keeper.decide(look_of(keeper, 0.5, refusing_at=50.0), BOUNDS, 0.0) == 3
    assert keeper.decide(look_of(keeper, 0.5, refusing_at=50.0, present=2), BOUNDS, 60.0) == 3
    assert keeper.decide(look_of(keeper, 0.5, refusing_at=50.0), BOUNDS, 120.0) == 4
    assert keeper.last.reason == "refused"


def test_a_node_that_could_not_be_started_is_given_up_once_it_is_not_needed() -> None:
    keeper = SizeKeeper(1, 0.0)
    assert history(keeper, [1.5] * 10)[-1] == 2
    for at in range(100):
        look = look_of(keeper, 0.2, present=1, running=1)
        keeper.decide(look, BOUNDS, 100.0 + EVERY_S * at)
    assert keeper.wanted == 1


def test_nodes_that_run_and_do_not_serve_are_waited_for() -> None:
    keeper = SizeKeeper(2, 0.0)
    for at in range(100):
        keeper.decide(look_of(keeper, 0.2, present=1), BOUNDS, EVERY_S * at)
    assert keeper.wanted == 2


def test_a_number_that_has_refused_is_not_trusted_with_as_much_for_an_hour() -> None:
    keeper = SizeKeeper(2, 0.0)
    keeper.decide(look_of(keeper, 0.5, refusing_at=50.0), BOUNDS, 0.0)
    busy = history(keeper, [0.5] * 300, EVERY_S)
    assert set(busy) == {3}, "as much is asked for as when two refused"
    idle = history(keeper, [0.3] * 300, 700.0)
    assert idle[-1] == 1
    again = SizeKeeper(2, 0.0)
    again.decide(look_of(again, 0.5, refusing_at=50.0), BOUNDS, 0.0)
    assert history(again, [0.5] * 100, REMEMBERED_S)[-1] == 1


def test_the_rate_that_was_refused_counts_and_not_what_was_projected_by_then() -> None:
    keeper = SizeKeeper(1, 0.0)
    keeper.decide(look_of(keeper, 0.1, refusing_at=400.0), BOUNDS, 0.0)
    assert history(keeper, [0.5] * 100, EVERY_S)[-1] == 1, "50 tokens/s are little beside 400"


def test_clients_that_ask_again_and_again_do_not_make_it_flap() -> None:
    keeper, now, wanted = SizeKeeper(2, 0.0), 0.0, [2]
    for _ in range(1000):
        now += EVERY_S
        refused = 5000.0 if keeper.wanted < 3 else None  # what is refused is asked for again and again
        wanted.append(keeper.decide(look_of(keeper, 0.5, refusing_at=refused), BOUNDS, now))
    changes = [pair for pair in pairwise(wanted) if pair[0] != pair[1]]
    assert changes == [(2, 3), (3, 2), (2, 3)]
