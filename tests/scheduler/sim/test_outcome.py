"""What becomes of requests, and the figures that are worked out from it."""

from collections.abc import Sequence

import pytest

from scheduler.cluster.cost.profile import Slo
from scheduler.sim.outcome import Record
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
    assert (made.retries, made.broken_promises) == (1, 0), "nothing was promised at first"
    made.retry()
    made.end(5.0, served=False, retry_after_s=1.0)
    assert (made.retries, made.broken_promises, made.refused_retry_after_s) == (2, 1, 1.0)
    made.retry()
    made.token(7.0)
    made.end(7.5, served=True)
    assert (made.ttft_s, made.broken_promises) == (6.0, 1)
