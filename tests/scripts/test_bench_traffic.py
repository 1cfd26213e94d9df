"""Who asks for what, and when: the laws that traffic is drawn by, and what malformed requests look like."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.demo.embedded import TASKS
from scripts.bench import question, report, traffic
from scripts.bench.client import Outcome, Verdict
from scripts.bench.traffic import Arrival, Call, Fault

NAMES = tuple(f"a{number}" for number in range(5))
ARRIVAL = Arrival(0.0, "a0", prompt_tokens=7, output_tokens=5)


def test_popularity_follows_zipf_with_a_share_for_the_base() -> None:
    popularity, rng, draws = traffic.zipf("base", NAMES, 1.0, 0.2, Random(1)), Random(2), 20_000
    assert set(popularity.names) == {"base", *NAMES}
    counts = Counter(popularity.draw(rng) for _ in range(draws))
    harmonic = sum(1 / place for place in range(1, 6))
    expected = [0.2, *(0.8 / place / harmonic for place in range(1, 6))]
    for name, share in zip(popularity.names, expected, strict=True):
        deviation = math.sqrt(share * (1 - share) / draws)
        assert counts[name] / draws == pytest.approx(share, abs=4 * deviation)


def test_without_adapters_all_is_for_the_base() -> None:
    assert traffic.zipf("base", (), 1.0, 0.1, Random(0)).names == ("base",)


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    calls = list(itertools.islice(traffic.poisson(20.0, (3, 5), (1, 1), Random(3)), 20_001))
    gaps_s = [after.at_s - before.at_s for before, after in itertools.pairwise(calls)]
    mean_s = sum(gaps_s) / len(gaps_s)
    spread_s = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s))
    assert mean_s == pytest.approx(1 / 20, rel=0.03)
    assert spread_s == pytest.approx(1 / 20, rel=0.05)  # an exponential's mean and deviation are one
    assert {call.prompt_tokens for call in calls} == {3, 4, 5}


def test_an_infinite_rate_means_all_at_once() -> None:
    assert {
        call.at_s for call in itertools.islice(traffic.poisson(math.inf, (1, 2), (1, 2), Random(0)), 9)
    } == {0.0}


def test_a_trace_begins_at_zero_and_is_stretched(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:59:59.9000000,374,44\n"
        "2023-11-16 19:00:01.4000009,396,109\n"
    )
    assert traffic.read_trace(path, 2.0) == [Call(0.0, 374, 44), Call(3.0, 396, 109)]


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
    popularity = traffic.zipf("base", NAMES, 1.0, 0.1, Random(0))
    calls = traffic.poisson(1.0, (1, 1), (1, 1), Random(1))
    drawn = list(itertools.islice(traffic.arrivals(calls, popularity, 0.25, Random(2)), 4000))
    counts = Counter(arrival.fault for arrival in drawn)
    faulty = 4000 - counts[None]
    assert faulty / 4000 == pytest.approx(0.25, abs=0.03)
    assert abs(counts[Fault.LEAVES] - faulty / 2) <= 1
    assert (
        max(counts[fault] for fault in question.SPOIL) - min(counts[fault] for fault in question.SPOIL) <= 1
    )


def test_a_sound_question_has_the_arrivals_lengths() -> None:
    body = json.loads(question.ask_tokens(ARRIVAL, Random(0)).body)
    assert (body["model"], len(body["prompt"]), body["max_tokens"]) == ("a0", 7, 5)


@pytest.mark.parametrize("fault", question.SPOIL)
def test_a_malformed_question_differs_from_the_sound_one_in_its_fault_alone(fault: Fault) -> None:
    arrival = Arrival(0.0, "a0", 7, 5, fault)
    sound = json.loads(question.ask_tokens(ARRIVAL, Random(0)).body)
    raw = question.ask_badly(arrival, 100, Random(0)).body
    if fault is Fault.BAD_JSON:
        with pytest.raises(json.JSONDecodeError):
            json.loads(raw)
        return
    body = json.loads(raw)
    changed = {name for name in sound if body.get(name) != sound[name]}
    assert len(changed) == 1
    if fault is Fault.TOO_LONG:
        assert len(body["prompt"]) > 100


def test_tasks_are_asked_with_their_answers() -> None:
    task = next(task for task in TASKS if task.name == "reverse")
    own = question.ask_task(Arrival(0.0, "reverse", 1, 1), Random(0))
    assert own.answer == task.answer(json.loads(own.body)["messages"][0]["content"])
    base = question.ask_task(Arrival(0.0, "base", 1, 1), Random(0))
    name, _, text = json.loads(base.body)["messages"][0]["content"].partition(": ")
    assert base.answer == next(task for task in TASKS if task.name == name).answer(text)


def test_the_report_times_sound_requests_and_counts_all() -> None:
    outcomes = [
        Outcome(ARRIVAL, Verdict.OK, 1.0, 0.0, (1.5, 1.6, 1.8), 3),
        Outcome(ARRIVAL, Verdict.LEFT, 1.0, 0.0, (9.0,), 1),
        Outcome(Arrival(0.0, "base", 1, 1), Verdict.FAILED, 1.0, 0.0, detail="status 500"),
    ]
    a0, base, total = report.rows(outcomes, {"a0": 16}, wall_s=2.0)
    assert (a0["model"], a0["rank"], a0["requests"], a0["ok"], a0["left"]) == ("a0", 16, 2, 1, 1)
    assert a0["ttft_p95_ms"] == pytest.approx(500)
    assert a0["tbt_p50_ms"] == pytest.approx(150)
    assert (a0["output_tok_s"], total["output_tok_s"], total["failed"]) == (2.0, 2.0, 1)
    assert math.isnan(base["ttft_p50_ms"])
    assert report.grievances(outcomes) == ["base: status 500"]
    header, first, *_ = report.table([a0, base, total]).splitlines()
    assert header.split()[:3] == ["model", "rank", "requests"]
    assert first.split()[:3] == ["a0", "16", "2"]
