"""A bucket against brute force: whatever is asked of it and whenever, it says what counting by small steps says."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tenants.token_bucket import TokenBucket

TICK = Fraction(1, 8)  # seconds, and exact in floats too
CAPACITIES = st.sampled_from([1, 2, 3, 7, 60, 64])
DOINGS = st.lists(
    st.tuples(
        st.sampled_from(["pass", "take", "overdraw", "give_back", "resize"]),
        st.integers(0, 70),
    ),
    max_size=40,
)


class CountedBucket:
    """The level of a bucket in whole parts, counted tick by tick."""

    def __init__(self, capacity: int, period: int) -> None:
        self.capacity, self.period = capacity, period
        self.level = Fraction(capacity)

    def pass_ticks(self, ticks: int) -> None:
        for _ in range(ticks):
            self.level = min(Fraction(self.capacity), self.level + TICK * self.capacity / self.period)

    def ticks_until(self, amount: int) -> int:
        ahead = CountedBucket(self.capacity, self.period)
        ahead.level = self.level
        ticks = 0
        while ahead.level < amount:
            ahead.pass_ticks(1)
            ticks += 1
        return ticks


@given(CAPACITIES, st.sampled_from([8, 60]), DOINGS)
def test_it_says_what_counting_says(capacity: int, period: int, doings: list[tuple[str, int]]) -> None:
    ticks, counted, bucket = 0, CountedBucket(capacity, period), TokenBucket(capacity, period, 0.0)
    for doing, amount in doings:
        now_s = float(ticks * TICK)
        if doing == "pass":
            counted.pass_ticks(amount)
            ticks += amount
        elif doing == "take" and counted.level >= amount:
            assert bucket.wait_s(amount, now_s) == 0
            counted.level -= amount
            bucket.take(amount, now_s)
        elif doing == "overdraw":
            counted.level -= amount
            bucket.take(amount, now_s)
        elif doing == "give_back":
            counted.level = min(Fraction(counted.capacity), counted.level + amount)
            bucket.give_back(amount, now_s)
        elif doing == "resize":
            larger = amount + 1
            counted.level += larger - counted.capacity
            counted.capacity = larger
            bucket.resize(larger, now_s)
        assert bucket.level(float(ticks * TICK)) == pytest.approx(float(counted.level), abs=1e-6)


@given(CAPACITIES, st.sampled_from([8, 60]), st.integers(1, 64), st.integers(0, 80))
def test_who_waits_as_long_as_told_gets_it_and_not_much_earlier(
    capacity: int, period: int, amount: int, taken: int
) -> None:
    counted, bucket = CountedBucket(capacity, period), TokenBucket(capacity, period, 0.0)
    counted.level -= taken
    bucket.take(taken, 0.0)
    wait_s = bucket.wait_s(amount, 0.0)
    if amount > capacity:
        assert wait_s == float("inf")
        return
    assert bucket.wait_s(amount, wait_s) == 0
    ticks = counted.ticks_until(amount)
    assert (ticks - 1) * TICK <= wait_s + 1e-6
    assert wait_s <= ticks * TICK + 1e-6


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(10, 60, 100.0)
    bucket.take(10, 100.0)
    assert bucket.level(100.0) == bucket.level(50.0) == 0
    bucket.take(0, 50.0)
    assert bucket.level(106.0) == pytest.approx(1.0)
