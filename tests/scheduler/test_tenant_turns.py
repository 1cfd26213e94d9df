"""Tenants that wait have turns, by the tokens that each was given and its weight."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.limits import StepLimits
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams
from scheduler.tenant_turns import TenantTurns
from tests.scheduler.rig import Rig, request


def turns(**weights: float) -> TenantTurns:
    made = TenantTurns()
    made.start()
    made.weigh(weights)
    return made


def one_seat(taking: TenantTurns | None) -> Rig:
    return Rig(StepLimits(1, 8, 100), turns=taking)


def asked(
    tenant: str, count: int, prompt: int = 4, tokens: int = 4, since_s: float = 0.0, **fields: int
) -> list[Request]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)
    return [
        replace(
            request(f"{tenant}{at}", [at % 3] * prompt, params=params),
            tenant=tenant,
            arrival_s=since_s + at,
            **fields,
        )
        for at in range(count)
    ]


def order(plans: list[StepPlan]) -> list[str]:
    """Return the tenants in the order in which their requests began."""
    began = dict.fromkeys(part.key.request_id for plan in plans for part in plan.slices)
    return [name[0] for name in began]


def test_one_who_asks_for_little_does_not_wait_for_all_that_another_asks_for() -> None:
    rig = one_seat(turns())
    rig.add(*asked("a", 20))
    rig.steps(12)
    rig.add(*asked("b", 3, since_s=100.0))
    before = len(order(rig.plans))
    rig.drain()
    assert order(rig.plans)[before : before + 6] == ["a", "b"] * 3


def test_without_turns_who_comes_first_goes_first_whoever_it_is() -> None:
    rig = one_seat(None)
    rig.add(*asked("a", 5), *asked("b", 2, since_s=100.0))
    rig.drain()
    assert order(rig.plans) == ["a"] * 5 + ["b"] * 2


@given(st.sampled_from([1.0, 2.0, 4.0]), st.integers(1, 4))
def test_tokens_go_by_weight_where_all_want_more(weight: float, seats: int) -> None:
    rig = Rig(StepLimits(seats, 16, 100), num_blocks=256, turns=turns(a=weight))
    rig.add(*asked("a", 60, prompt=8), *asked("b", 60, prompt=3, tokens=9))
    given_tokens = Counter[str]()
    for plan in rig.steps(100):
        for part in plan.slices:
            given_tokens[part.key.request_id[0]] += len(part.token_ids)
    longest = 12  # tokens of a request, of which each seat may have begun one too many
    assert abs(given_tokens["a"] / weight - given_tokens["b"]) <= 2 * longest * seats


def test_nobody_saves_turns_up_nor_pays_for_time_that_nobody_wanted() -> None:
    rig = one_seat(turns())
    rig.add(*asked("a", 1, tokens=60))
    rig.drain()
    rig.add(*asked("b", 6), *[replace(each, request_id=f"a+{each.request_id}") for each in asked("a", 6)])
    before = len(order(rig.plans))
    rig.drain()
    assert Counter(order(rig.plans)[before : before + 6]) == {"a": 3, "b": 3}


def test_a_lower_priority_goes_before_any_turn_and_what_was_admitted_goes_on() -> None:
    rig = one_seat(turns())
    rig.add(*asked("a", 3, priority=1), *asked("b", 3))
    rig.drain()
    assert order(rig.plans) == ["b"] * 3 + ["a"] * 3


def test_what_is_aborted_while_it_waits_leaves_no_line_behind() -> None:
    rig = one_seat(turns())
    rig.add(*asked("a", 3), *asked("b", 3), *asked("c", 1))
    rig.step()
    for tenant in "abc":
        for at in range(3):
            rig.abort(f"{tenant}{at}")
    assert not len(rig.scheduler._waiting)
    rig.add(*asked("b", 1))
    rig.drain()
    assert rig.scheduler.live().waiting == 0
