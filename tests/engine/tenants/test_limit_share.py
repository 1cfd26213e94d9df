"""Limits that routers divide: together they let through what the limit says, and refuse nothing for ever."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BeyondLimit, RateLimited
from engine.tenants.limit_share import WHOLE, LimitShare
from tests.engine.tenants.test_accounts import Clock, Desk, tenant

SLACK = 1e-6


def doors(count: int, **limits: int) -> list[Desk]:
    """Make the desks of so many routers, on one clock."""
    clock = Clock()
    made = [Desk(tenant(**limits), longest=1000, clock=clock) for _ in range(count)]
    names = [f"router-{at}" for at in range(count)]
    for name, desk in zip(names, made, strict=True):
        desk.accounts.divide(LimitShare.among(name, names))
    return made


@given(st.integers(1, 9), st.integers(1, 40))
def test_parts_sum_to_the_limit_and_each_lets_somebody_in(count: int, most: int) -> None:
    shares = [LimitShare.among(str(at), map(str, range(count))) for at in range(count)]
    assert sum(share.rate(most) for share in shares) == pytest.approx(most)
    parts = [share.count(most) for share in shares]
    assert sum(parts) == max(most, count)
    assert min(parts) >= 1
    assert all(share.count(0) == 0 for share in shares)


def test_a_router_counts_itself_before_the_coordinator_does() -> None:
    assert LimitShare.among("b", ["a", "c"]) == LimitShare(1, 3)
    assert LimitShare.among("a", []) == WHOLE


@given(
    st.integers(1, 4),
    st.integers(20, 60),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.floats(0, 20)), min_size=10, max_size=30),
)
def test_however_tokens_are_asked_for_no_more_flow_than_the_limit(
    count: int, limit: int, asked: list[tuple[int, int, float]]
) -> None:
    desks = doors(count, tokens_per_minute=limit)
    clock, taken = desks[0].clock, 0
    began_s = clock.now_s
    for at, tokens, pause_s in asked:
        clock.now_s += pause_s
        with suppress(RateLimited):
            desks[at % count].begin(prompt=tokens, tokens=1)
            taken += tokens + 1
        # A full share at the beginning, and at each door one request that became a debt.
        bound = limit * (1 + (clock.now_s - began_s) / 60) + count * 21
        assert taken <= bound + SLACK


def test_what_is_more_than_a_share_and_within_the_limit_waits_and_gets_in() -> None:
    first, second = doors(2, tokens_per_minute=100, requests_per_minute=1)
    first.begin(prompt=79, tokens=1)
    with pytest.raises(RateLimited, match="used its 1 requests per minute: retry in 120 s") as refusal:
        first.begin(prompt=79, tokens=1)
    second.begin(prompt=79, tokens=1)
    first.clock.now_s += refusal.value.retry_after_s
    assert first.told("requests") == ("1", "1", "0ms")
    first.begin(prompt=79, tokens=1)
    with pytest.raises(BeyondLimit, match="100 tokens per minute"):
        second.begin(prompt=100, tokens=1)


def test_an_answer_without_a_bound_reserves_no_more_than_a_share() -> None:
    first, _ = doors(2, tokens_per_minute=100)
    first.begin(prompt=10, tokens=None)
    assert first.told("tokens")[:2] == ("50", "0")
    with pytest.raises(RateLimited, match="retry in 12 s"):
        first.begin(prompt=9, tokens=1)


def test_the_share_of_a_router_that_leaves_falls_to_the_others() -> None:
    first, second = doors(2, concurrent=3, tokens_per_minute=60)
    first.begin(many=2, prompt=9, tokens=1)
    with pytest.raises(RateLimited, match="2 requests at once"):
        first.begin(prompt=9, tokens=1)
    second.begin(prompt=9, tokens=1)
    with pytest.raises(RateLimited):
        second.begin(prompt=9, tokens=1)
    first.accounts.divide(WHOLE)
    assert first.told("tokens") == ("60", "40", "20s")
    first.begin(prompt=9, tokens=1)
    with pytest.raises(RateLimited, match="3 requests at once"):
        first.begin(prompt=9, tokens=1)
