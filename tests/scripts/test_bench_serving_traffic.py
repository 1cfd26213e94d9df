"""Who asks for what, and when: the laws that traffic is drawn by, and what malformed requests look like."""

import json
import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.demo.embedded import TASKS
from scheduler.sim.workload.trace import Call
from scripts.bench.serving import http_request, report, traffic
from scripts.bench.serving.client import RequestEnd, RequestOutcome
from scripts.bench.serving.traffic import ClientFault, PlannedRequest

NAMES = tuple(f"a{number}" for number in range(5))
PLANNED = PlannedRequest(0.0, "a0", prompt_tokens=7, output_tokens=5)


def planned(count: int, popularity: traffic.ModelPopularity, fault_share: float) -> list[PlannedRequest]:
    calls = [Call(float(at), 1, 1) for at in range(count)]
    return list(traffic.plan_requests(calls, popularity, fault_share, np.random.default_rng(2)))


def test_popularity_follows_zipf_with_a_share_for_the_base() -> None:
    draws = 20_000
    popularity = traffic.zipf("base", NAMES, 1.0, 0.2, np.random.default_rng(1))
    assert set(popularity.names) == {"base", *NAMES}
    counts = Counter(one.model for one in planned(draws, popularity, 0.0))
    harmonic = sum(1 / place for place in range(1, 6))
    expected = [0.2, *(0.8 / place / harmonic for place in range(1, 6))]
    for name, share in zip(popularity.names, expected, strict=True):
        deviation = math.sqrt(share * (1 - share) / draws)
        assert counts[name] / draws == pytest.approx(share, abs=4 * deviation)


def test_without_adapters_all_is_for_the_base() -> None:
    assert traffic.zipf("base", (), 1.0, 0.1, np.random.default_rng(0)).names == ("base",)


def test_arrivals_at_a_rate_have_its_gaps_and_lengths_within_their_ranges() -> None:
    calls = traffic.at_rate(20.0, 1000.0, (3, 5), (1, 1), np.random.default_rng(3))
    gaps_s = np.diff([call.arrival_s for call in calls])
    assert gaps_s.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps_s.std() == pytest.approx(1 / 20, rel=0.05)  # an exponential's mean and deviation are one
    assert {call.prompt_tokens for call in calls} == {3, 4, 5}


def test_calls_at_once_are_as_many_as_asked_for() -> None:
    calls = traffic.at_once(9, (1, 2), (1, 2), np.random.default_rng(0))
    assert [call.arrival_s for call in calls] == [0.0] * 9
    assert {call.output_tokens for call in calls} <= {1, 2}


@given(
    st.lists(
        st.builds(Call, st.just(0.0), st.integers(1, 9000), st.integers(1, 2000)), min_size=1, max_size=20
    ),
    st.integers(4, 8192),
)
def test_fitted_calls_fit_and_those_that_fitted_stay(calls: list[Call], most_tokens: int) -> None:
    fitted = traffic.fit(calls, most_tokens)
    for after in fitted:
        assert after.prompt_tokens >= 1
        assert after.output_tokens >= 1
        assert after.prompt_tokens + after.output_tokens <= most_tokens
    if all(call.prompt_tokens + call.output_tokens <= most_tokens for call in calls):
        assert fitted == calls


def test_fitting_keeps_proportions_and_is_not_led_by_the_longest_call() -> None:
    calls = [Call(0.0, 300, 100)] * 199 + [Call(0.0, 9000, 1000)]
    fitted = traffic.fit(calls, 200)
    assert set(fitted[:-1]) == {Call(0.0, 150, 50)}
    assert fitted[-1] == Call(0.0, 1, 199)


def test_the_share_of_faults_is_half_leavers_and_every_kind_of_malformed_request() -> None:
    popularity = traffic.zipf("base", NAMES, 1.0, 0.1, np.random.default_rng(0))
    counts = Counter(one.fault for one in planned(4000, popularity, 0.25))
    faulty = 4000 - counts[None]
    assert faulty / 4000 == pytest.approx(0.25, abs=0.03)
    assert abs(counts[ClientFault.LEAVES] - faulty / 2) <= 1
    assert (
        max(counts[fault] for fault in http_request.SPOIL)
        - min(counts[fault] for fault in http_request.SPOIL)
        <= 1
    )


def test_a_sound_request_has_the_planned_lengths() -> None:
    body = json.loads(http_request.token_request(PLANNED, Random(0)).body)
    assert (body["model"], len(body["prompt"]), body["max_tokens"]) == ("a0", 7, 5)


@pytest.mark.parametrize("fault", http_request.SPOIL)
def test_a_malformed_request_differs_from_the_sound_one_in_its_fault_alone(fault: ClientFault) -> None:
    malformed = PlannedRequest(0.0, "a0", 7, 5, fault)
    sound = json.loads(http_request.token_request(PLANNED, Random(0)).body)
    raw = http_request.malformed_request(malformed, 100, Random(0)).body
    if fault is ClientFault.BAD_JSON:
        with pytest.raises(json.JSONDecodeError):
            json.loads(raw)
        return
    body = json.loads(raw)
    changed = {name for name in sound if body.get(name) != sound[name]}
    assert len(changed) == 1
    if fault is ClientFault.TOO_LONG:
        assert len(body["prompt"]) > 100


def test_tasks_are_asked_with_their_answers() -> None:
    task = next(task for task in TASKS if task.name == "reverse")
    own = http_request.task_request(PlannedRequest(0.0, "reverse", 1, 1), Random(0))
    assert own.answer == task.answer(json.loads(own.body)["messages"][0]["content"])
    base = http_request.task_request(PlannedRequest(0.0, "base", 1, 1), Random(0))
    name, _, text = json.loads(base.body)["messages"][0]["content"].partition(": ")
    assert base.answer == next(task for task in TASKS if task.name == name).answer(text)


def test_the_report_times_sound_requests_and_counts_all() -> None:
    outcomes = [
        RequestOutcome(PLANNED, RequestEnd.OK, 1.0, 0.0, (1.5, 1.6, 1.8), 3),
        RequestOutcome(PLANNED, RequestEnd.LEFT, 1.0, 0.0, (9.0,), 1),
        RequestOutcome(PlannedRequest(0.0, "base", 1, 1), RequestEnd.FAILED, 1.0, 0.0, detail="status 500"),
    ]
    a0, base, total = report.rows(outcomes, {"a0": 16}, wall_s=2.0)
    assert (a0["model"], a0["rank"], a0["requests"], a0["ok"], a0["left"]) == ("a0", 16, 2, 1, 1)
    assert a0["ttft_p95_ms"] == pytest.approx(500)
    assert a0["tbt_p50_ms"] == pytest.approx(150)
    assert (a0["output_tok_s"], total["output_tok_s"], total["failed"]) == (2.0, 2.0, 1)
    assert math.isnan(base["ttft_p50_ms"])
    assert report.failures(outcomes) == ["base: status 500"]
    header, first, *_ = report.table([a0, base, total]).splitlines()
    assert header.split()[:3] == ["model", "rank", "requests"]
    assert first.split()[:3] == ["a0", "16", "2"]
