"""What becomes of requests, and the figures that are worked out from it."""

from collections.abc import Sequence
from sys import getsizeof

import pytest

from scheduler.cluster.cost.profile import Slo
from scheduler.sim.outcome import Record, in_time_by_second, in_time_by_tenant, summary
from scheduler.sim.workload.trace import Arrival, Call
from tests.scheduler.sim.clusters import adapters

SLO = Slo(ttft_s=2.0, tbt_s=0.125)
ADAPTER = adapters(1)[0]


def record(at_s: float, tokens: Sequence[float] = (), tenant: str = "") -> Record:
    """Make the record of a request that was served where it has tokens, else refused at once."""
    made = Record(Arrival(f"r{at_s}", Call(at_s, 10, max(1, len(tokens))), ADAPTER, tenant))
    for time_s in tokens:
        made.token(time_s)
    made.end(tokens[-1] if tokens else at_s, served=bool(tokens))
    return made


@pytest.mark.parametrize(
    ("tokens", "in_time"),
    [
        ((3.0, 3.125, 3.25), True),
        ((3.125, 3.25, 3.375), False),
        ((2.0, 2.0, 2.5), False),
        ((2.0, 2.0, 2.25, 2.375), True),
        ((), False),
    ],
)
def test_a_request_is_in_time_if_its_first_token_and_its_mean_gap_are(
    tokens: tuple[float, ...], in_time: bool
) -> None:
    assert record(1.0, tokens).in_time(SLO) is in_time


def test_a_client_that_is_refused_again_when_it_was_told_to_come_was_told_wrongly() -> None:
    made = record(1.0)
    made.retry()
    assert made.end_s is None
    made.end(2.0, served=False, retry_after_s=3.0)
    assert (made.retries, made.promises_broken) == (1, 0), "nothing was promised at first"
    made.retry()
    made.end(5.0, served=False, retry_after_s=1.0)
    assert (made.retries, made.promises_broken, made.refused_retry_after_s) == (2, 1, 1.0)
    made.retry()
    made.token(7.0)
    made.end(7.5, served=True)
    assert (made.ttft_s, made.promises_broken, made.promise_kept) == (6.0, 1, True)


def test_a_run_is_judged_by_all_that_was_asked_not_by_what_was_served() -> None:
    made = [record(0.0, (1.0, 1.125)), record(0.5, (3.0,)), record(1.0), record(2.0, (2.5, 2.5, 3.5))]
    figures = summary(made, SLO, 4.0)
    assert (figures.requests, figures.served, figures.refused) == (4, 3, 1)
    assert (figures.in_time, figures.goodput) == (0.25, 0.25)
    assert figures.ttft_p50_s == 1.0
    assert not figures.meets(SLO)
    assert summary(made[:1], SLO, 4.0).meets(SLO)
    nothing = summary([], SLO, 4.0)
    assert (nothing.requests, nothing.in_time, nothing.gap_p99_s, nothing.worst_tenant) == (0, 0.0, 0.0, None)


def test_a_pause_within_an_answer_shows_among_single_gaps_though_not_in_its_mean() -> None:
    even = record(0.0, [1.0 + at / 64 for at in range(50)])
    paused = record(0.0, [1.0 + at / 64 + 2.0 * (at > 25) for at in range(50)])
    figures = summary([even, paused], SLO, 1.0)
    assert figures.in_time == 1.0
    assert figures.tbt_p95_s < 0.1
    assert figures.gap_p99_s == pytest.approx(1 / 64 + 2.0 * 0.03, abs=0.07)
    assert summary([even], SLO, 1.0).gap_p99_s == 1 / 64


def test_the_worst_tenant_is_found_among_those_with_enough_requests() -> None:
    good = [record(float(at), (at + 1.0,), "good") for at in range(30)]
    poor = [record(float(at), (at + 1.0 + 4.0 * (at < 15),), "poor") for at in range(20)]
    rare = [record(float(at), (), "rare") for at in range(19)]
    records = [*good, *poor, *rare]
    assert in_time_by_tenant(records, SLO) == {"good": 1.0, "poor": 0.25}
    figures = summary(records, SLO, 30.0)
    assert figures.worst_tenant == 0.25
    assert figures.jain == pytest.approx(1.25**2 / (2 * (1 + 0.0625)))
    assert summary(good, SLO, 30.0).jain == 1.0


def test_over_time_a_run_shows_when_it_was_late_and_when_it_had_recovered() -> None:
    records = [
        record(0.25, (1.0,)),
        record(0.5, (1.0,)),
        record(1.5, (9.0,)),
        record(1.75, (2.0,)),
        record(3.0),
    ]
    assert in_time_by_second(records, SLO, 3.5) == (1.0, 0.5, None, 0.0)


def test_kept_and_broken_promises_are_counted() -> None:
    kept, broken, first = record(0.0), record(0.0), record(0.0)
    for made, told in ((kept, 1.0), (broken, 1.0), (first, None)):
        made.end(0.0, served=False, retry_after_s=told)
        made.retry()
    kept.token(2.0)
    kept.end(2.0, served=True)
    broken.end(2.0, served=False, retry_after_s=1.0)
    first.token(2.0)
    first.end(2.0, served=True)
    figures = summary([kept, broken, first], SLO, 1.0)
    assert (figures.promises_kept, figures.promises_broken) == (1, 1)


def test_millions_of_tokens_take_little_more_than_their_times() -> None:
    made = record(0.0)
    for at in range(10_000):
        made.token(float(at))
    assert getsizeof(made.token_times) < 10 * 10_000
