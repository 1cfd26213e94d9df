"""Arrivals: rates that change, bursts, lengths, tenants, and prompts that begin alike."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from scheduler.sim.workload.adapters import EQUAL, catalogue
from scheduler.sim.workload.lengths import (
    HeavyTailedLengths,
    InvalidLengths,
    LengthLaw,
    LongPrompts,
    TracedLengths,
    length_law,
    with_lengths,
)
from scheduler.sim.workload.popularity import PowerLaw
from scheduler.sim.workload.prompt import DRAWN_TOKEN_ID
from scheduler.sim.workload.rates import (
    InvalidArrivals,
    Pacing,
    RateCurve,
    gamma_times,
    process_cv,
    rate_curve,
)
from scheduler.sim.workload.sessions import InvalidSessions, SessionOptions, in_sessions, tenants_of
from scheduler.sim.workload.trace import Arrival, Call, poisson

REFS = catalogue(20, EQUAL)
TRACE = poisson(10.0, 100.0, (300, 40), np.random.default_rng(0))


def _counts(calls: tuple[Call, ...], seconds: int) -> list[int]:
    """Count the calls of each ten seconds."""
    times = [call.arrival_s for call in calls]
    return np.histogram(times, bins=seconds // 10, range=(0, seconds))[0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steady", [100] * 10),
        ("steady:2", [200] * 10),
        ("step:3:30:20", [100] * 3 + [300] * 2 + [100] * 5),
    ],
)
@pytest.mark.parametrize("cv", [None, 1.0], ids=["trace", "poisson"])
def test_calls_come_at_the_rate_that_the_curve_says(text: str, expected: list[int], cv: float | None) -> None:
    calls = Pacing(10.0, 100.0, cv, rate_curve(text, 100.0)).calls(TRACE, np.random.default_rng(1))
    assert _counts(calls, 100) == pytest.approx(expected, rel=0.3)
    assert len(calls) == pytest.approx(sum(expected), rel=0.1)
    assert [call.arrival_s for call in calls] == sorted(call.arrival_s for call in calls)


def test_a_flash_crowd_leaps_and_goes_and_a_day_rises_and_falls() -> None:
    flash, day = rate_curve("flash:4", 100.0), rate_curve("day:0.5", 100.0)
    assert flash.mean(40.0) == pytest.approx(1.0)
    assert flash.factors[96:98] == pytest.approx((4.0, 4.0), rel=0.05)
    assert flash.factors[-1] < 1.01
    assert day.mean(100.0) == pytest.approx(1.0)
    assert (min(day.factors), max(day.factors)) == pytest.approx((0.5, 1.5))
    assert day.factors[0] == min(day.factors)


def test_time_under_a_curve_is_worked_out_by_hand() -> None:
    curve = RateCurve((0.0, 10.0, 15.0), (1.0, 3.0, 0.5))
    assert curve.times(np.array([5.0, 10.0, 16.0, 25.0, 26.0])).tolist() == [5.0, 10.0, 12.0, 15.0, 17.0]
    assert curve.mean(20.0) == pytest.approx((10 + 15 + 2.5) / 20)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gaps_of_a_gamma_process_vary_as_asked(cv: float) -> None:
    gaps = np.diff(gamma_times(10.0, 5000.0, cv, np.random.default_rng(3)))
    assert gaps.mean() == pytest.approx(0.1, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_processes_go_by_name() -> None:
    found = [process_cv(text) for text in ("trace", "poisson", "gamma", "gamma:4")]
    assert found == [None, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("text", ["", "gamma:", "gamma:0", "gamma:x", "poisson:2", "weibull"])
def test_a_process_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidArrivals, match="arrivals="):
        process_cv(text)


@pytest.mark.parametrize(
    "text", ["", "steady:0", "steady:x", "step:3", "step:3:30", "day:1", "day:2", "night"]
)
def test_a_curve_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidArrivals, match="give "):
        rate_curve(text, 100.0)


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("trace", TracedLengths()),
        ("burstgpt", HeavyTailedLengths()),
        ("long", LongPrompts()),
        ("long:0.1", LongPrompts(0.1)),
    ],
)
def test_laws_of_lengths_go_by_name(text: str, law: LengthLaw) -> None:
    assert length_law(text) == law


@pytest.mark.parametrize("text", ["", "long:", "long:0", "long:2", "trace:1", "short"])
def test_a_law_of_lengths_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidLengths, match="lengths="):
        length_law(text)


def test_lengths_have_heavy_tails_or_are_long_or_stay_what_they_were() -> None:
    rng, calls = np.random.default_rng(4), TRACE * 10
    heavy = [call.prompt_tokens for call in with_lengths(calls, HeavyTailedLengths(), rng)]
    assert np.median(heavy) == pytest.approx(394, rel=0.06)
    assert np.percentile(heavy, 95) > 10 * np.median(heavy)
    assert (min(heavy) >= 1, max(heavy)) == (True, 8192)
    mixed = with_lengths(calls, LongPrompts(0.25), rng)
    assert np.mean([8192 <= call.prompt_tokens <= 16384 for call in mixed]) == pytest.approx(0.25, abs=0.02)
    assert [call.output_tokens for call in mixed] == [call.output_tokens for call in calls]
    assert with_lengths(calls, TracedLengths(), rng) == calls


def _drawn(options: SessionOptions, seed: int = 5) -> tuple[Arrival, ...]:
    calls = poisson(20.0, 120.0, (300, 40), np.random.default_rng(1))
    return in_sessions(calls, REFS, PowerLaw(0.5), options, np.random.default_rng(seed))


def test_each_adapter_has_one_tenant_and_each_tenant_an_adapter() -> None:
    owners = tenants_of(REFS, 6, np.random.default_rng(0))
    counts = Counter(owners.values())
    assert sum(counts.values()) == 20
    assert len(counts) == 6
    assert max(counts.values()) > 1
    assert set(tenants_of(REFS, 0, np.random.default_rng(0)).values()) == {ref.name for ref in REFS}
    for each in _drawn(SessionOptions(tenants=6)):
        assert each.tenant == tenants_of(REFS, 6, np.random.default_rng(5))[each.adapter]


def test_without_sessions_and_system_prompts_no_prompt_shares_a_token_with_another() -> None:
    arrivals = _drawn(SessionOptions())
    first = [each.prompt_token_ids(own_id=0)[0] for each in arrivals]
    assert len(set(first)) == len(first)
    assert all(len(each.prompt_token_ids(0)) == each.call.prompt_tokens for each in arrivals)


def test_prompts_of_one_tenant_begin_with_its_system_prompt() -> None:
    arrivals = _drawn(SessionOptions(tenants=3, system_tokens=100))
    begins = {each.tenant: each.prompt_token_ids(0)[:100] for each in arrivals}
    assert len(set(begins.values())) == 3
    for each in arrivals:
        ids = each.prompt_token_ids(0)
        assert ids[:100] == begins[each.tenant]
        assert ids[100] not in begins[each.tenant]


def test_a_later_turn_begins_with_the_turn_before_and_its_answer() -> None:
    """The turn before is known by its text: of the arrivals whose prompt it begins with the latest."""
    options = SessionOptions(turns=4.0, gap_s=5.0, turn_tokens=30, most_tokens=2000)
    arrivals = _drawn(options)
    by_text = {each.prompt.runs[-1].text_id: each for each in arrivals}
    later = [each for each in arrivals if len(each.prompt.runs) > 1]
    assert 0.6 < len(later) / len(arrivals) < 0.75, "a session has four turns in the mean"
    for each in later:
        before = by_text[each.prompt.runs[-3].text_id]
        ids, prompt = each.prompt_token_ids(0), before.prompt_token_ids(0)
        answer = (DRAWN_TOKEN_ID,) * before.call.output_tokens
        assert ids[: len(prompt) + len(answer)] == prompt + answer
        assert each.adapter == before.adapter
        assert each.call.arrival_s > before.call.arrival_s + 0.05 * before.call.output_tokens
        assert each.call.prompt_tokens + each.call.output_tokens <= 2000
    assert len({each.prompt.runs[-3].text_id for each in later}) == len(later), (
        "no turn is gone on from twice"
    )


def test_sessions_change_neither_when_calls_come_nor_which_adapters_they_ask_for() -> None:
    plain, talking = _drawn(SessionOptions()), _drawn(SessionOptions(turns=5.0, system_tokens=50))
    assert [each.call.arrival_s for each in plain] == [each.call.arrival_s for each in talking]
    assert [each.adapter for each in plain] == [each.adapter for each in talking]


def test_a_part_of_the_requests_is_in_the_background() -> None:
    bands = Counter(each.priority for each in _drawn(SessionOptions(background=0.3)))
    assert set(bands) == {0, 1}
    assert bands[1] / sum(bands.values()) == pytest.approx(0.3, abs=0.03)


def test_the_same_seed_draws_the_same_arrivals() -> None:
    options = SessionOptions(tenants=4, turns=3.0, system_tokens=64, background=0.2)
    assert _drawn(options) == _drawn(options) != _drawn(options, seed=6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tenants": -1}, "tenants=-1: give 0"),
        ({"turns": 0.5}, "turns=0.5: give 1"),
        ({"turn_tokens": 0}, "turn_tokens=0: give 1"),
        ({"system_tokens": -1}, "system_tokens=-1"),
        ({"background": 2.0}, r"background=2\.0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSessions, match=says):
        SessionOptions(**given)
