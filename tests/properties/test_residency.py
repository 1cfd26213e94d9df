"""Who makes room is the cheapest choice of all: every window of small arenas is tried."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.memory.base import Claim, Force, Occupant, PageRequest, PageRun, Usage
from scheduler.residency import CheapestWindow, ReloadLoss, popularity
from scheduler.sim.ablations.named_policies import LastUseLoss

STEP = 1000
CLAIMS = st.sampled_from(
    (Claim.UNUSED, Claim.UNUSED, Claim.RETAINED, Claim.RETAINED, Claim.PINNED, Claim.LEAVING)
)
STEPS = st.sampled_from((STEP, STEP - 1, STEP - 2, STEP - 63, STEP - 64, 0))
USAGES = st.builds(Usage, st.integers(0, 9).map(float), STEPS, STEPS)
FORCES = st.sampled_from((Force.UNUSED, Force.NOT_RUNNING, Force.IDLE))


@dataclass(frozen=True)
class Whole:
    """A loss whose sums are exact: as many as there are uses, and one."""

    def losses(self, occupants: Sequence[Occupant], step: int) -> Sequence[float]:
        return [each.usage.uses + 1 for each in occupants]


@st.composite
def arenas(draw: st.DrawFn) -> tuple[PageRequest, list[Occupant]]:
    """A request, and who is on the arena's pages, in any order."""
    num_pages = draw(st.integers(1, 20))
    cuts = sorted(draw(st.sets(st.integers(0, num_pages), max_size=10)))
    occupants = [
        Occupant(PageRun(start, stop), draw(CLAIMS), draw(USAGES), 1.0)
        for start, stop in itertools.pairwise(cuts)
        if draw(st.booleans())
    ]
    request = PageRequest(draw(st.integers(1, num_pages)), num_pages, draw(FORCES), STEP)
    return request, draw(st.permutations(occupants))


def may_go(occupant: Occupant, force: Force) -> bool:
    """The rules once more, in other words."""
    usage = occupant.usage
    waited = force is Force.NOT_RUNNING and STEP - usage.used_step > 63
    offered = force is Force.IDLE and usage.placed_step < STEP - 1
    return occupant.claim in (Claim.UNUSED, Claim.LEAVING) or (
        occupant.claim is Claim.RETAINED and (waited or offered)
    )


def price(occupants: Sequence[Occupant]) -> tuple[int, float]:
    """How many adapters of live requests go, then what all that go are worth."""
    going = [each for each in occupants if each.claim is not Claim.LEAVING]
    retained = sum(each.claim is Claim.RETAINED for each in going)
    return retained, sum(each.usage.uses + 1 for each in going)


@settings(deadline=None)
@given(arenas())
def test_those_that_go_are_the_cheapest_neighbours_of_all(arena: tuple[PageRequest, list[Occupant]]) -> None:
    request, occupants = arena
    every = [PageRun(at, at + request.pages) for at in range(request.num_pages - request.pages + 1)]
    inside = [[each for each in occupants if each.run.overlaps(window)] for window in every]
    allowed = [each for each in inside if all(may_go(occupant, request.force) for occupant in each)]
    chosen = CheapestWindow(Whole()).displaced(request, occupants)
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert price(chosen) == min(map(price, allowed))
        assert list(chosen) in [
            sorted((o for o in each if o.claim is not Claim.LEAVING), key=lambda o: o.run) for each in allowed
        ]


@settings(deadline=None)
@given(arenas())
def test_by_last_use_the_latest_that_goes_is_the_oldest_of_all(
    arena: tuple[PageRequest, list[Occupant]],
) -> None:
    request, occupants = arena
    apart = {each.run: at for at, each in enumerate(occupants)}  # no two were used in the same step
    occupants = [
        Occupant(each.run, Claim.UNUSED, Usage(each.usage.uses, apart[each.run]), 1.0) for each in occupants
    ]
    every = [PageRun(at, at + request.pages) for at in range(request.num_pages - request.pages + 1)]
    ages = [
        sorted((apart[each.run] for each in occupants if each.run.overlaps(window)), reverse=True)
        for window in every
    ]
    chosen = CheapestWindow(LastUseLoss()).displaced(request, occupants)
    assert chosen is not None
    assert sorted((apart[each.run] for each in chosen), reverse=True) == min(ages)


def occupant(uses: float, used_step: int, reload_s: float) -> Occupant:
    return Occupant(PageRun(0, 1), Claim.UNUSED, Usage(uses, used_step), reload_s)


def test_a_loss_is_the_reload_by_popularity_which_halves_in_a_thousand_steps() -> None:
    often, cold, slow = occupant(4.0, 1000, 0.5), occupant(4.0, 0, 0.5), occupant(4.0, 1000, 2.0)
    assert popularity(cold.usage, 1000) == 2.0
    assert ReloadLoss().losses([often, cold, slow], 1000) == pytest.approx([2.0, 1.0, 8.0], rel=1e-3)


def test_what_never_ran_is_still_worth_its_reload() -> None:
    short, long = ReloadLoss().losses([occupant(0.0, 0, 0.1), occupant(0.0, 0, 0.2)], 5)
    assert 0 < short < long


def test_an_arrival_keeps_what_is_left_of_its_popularity() -> None:
    policy = CheapestWindow()
    usage = policy.placed(policy.ran(policy.ran(Usage(), 0), 0), 1000)
    assert usage == Usage(uses=1.0, used_step=1000, placed_step=1000)
    assert policy.ran(usage, 2000) == Usage(uses=1.5, used_step=2000, placed_step=1000)
