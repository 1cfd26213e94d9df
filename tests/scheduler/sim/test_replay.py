"""A replay counts what its policy can be judged by, on nodes that are what they truly are."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.policies import OURS
from scheduler.sim.replay import Hardware, Replay, Workload, replay
from scheduler.sim.simulator import Simulator
from scheduler.sim.true_costs import Deviation
from scheduler.sim.workload.prompt import DRAWN_TOKEN_ID, PromptShape, TextRun
from scheduler.sim.workload.trace import Arrival, Call
from tests.scheduler.sim.clusters import PROFILE, adapters, simulator_spec, traffic

GIB = 2**30
REFS = adapters(8)
HARDWARE = Hardware(PROFILE, Kernel.EXACT, 24 * GIB)
TRAFFIC = Workload(traffic(REFS, 10.0, 40.0, seed=2), REFS, 40.0)


def _replay(hardware: Hardware = HARDWARE, offered: Workload = TRAFFIC) -> Replay:
    return replay(OURS, 2, hardware, offered, seed=0)


@pytest.fixture(scope="module")
def done() -> Replay:
    """A replay on nodes that take what their profile says."""
    return _replay()


def test_what_comes_before_the_first_plan_is_in_place_does_not_count(done: Replay) -> None:
    assert 0 < done.counted_s < 20.0
    counted = sum(each.call.arrival_s >= done.counted_s for each in TRAFFIC.arrivals)
    assert done.outcome.requests == counted < len(TRAFFIC.arrivals)
    later = _replay(offered=replace(TRAFFIC, warm_s=30.0))
    assert later.counted_s == 30.0
    assert later.outcome.requests == sum(each.call.arrival_s >= 30.0 for each in TRAFFIC.arrivals)


@pytest.mark.slow
def test_the_same_seed_deviates_alike_and_another_otherwise(done: Replay) -> None:
    def outcome(seed: int) -> object:
        return _replay(replace(HARDWARE, deviation=Deviation(seed, sigma=0.2, drift=0.2))).outcome

    one = outcome(1)
    assert outcome(1) == one
    assert len({one, outcome(2), done.outcome}) == 3


def test_kernels_that_policies_are_not_told_of_take_their_true_time(done: Replay) -> None:
    fixed = replace(HARDWARE, deviation=Deviation(model=PROFILE.model(Kernel.FIXED)))
    assert _replay(fixed).outcome.tbt_p50_s > 1.02 * done.outcome.tbt_p50_s


def test_a_later_turn_is_read_only_from_where_the_turn_before_ended() -> None:
    """As long a prompt of its own text is read whole."""
    first = PromptShape((TextRun(2, 1800),))
    second = first.then(TextRun(DRAWN_TOKEN_ID, 100), TextRun(3, 100))
    arrivals = [
        Arrival("first", Call(20.0, 1800, 100), REFS[0], prompt=first),
        Arrival("second", Call(30.0, 2000, 10), REFS[0], prompt=second),
        Arrival("stranger", Call(40.0, 2000, 10), REFS[0]),
        Arrival("elsewhere", Call(50.0, 2000, 10), REFS[1], prompt=second),
    ]
    simulator = Simulator(simulator_spec(1, REFS), 0)
    simulator.run(arrivals, 60.0)
    ttft_s = {name: record.ttft_s for name, record in simulator.records.items()}
    assert ttft_s["second"] < 0.35 * ttft_s["stranger"]
    assert ttft_s["elsewhere"] == pytest.approx(ttft_s["stranger"], rel=0.2), (
        "another adapter's K/V is its own"
    )


def test_every_token_that_a_client_heard_has_its_time(done: Replay) -> None:
    record = next(each for each in done.records if each.arrival.call.output_tokens > 5)
    times = np.frombuffer(record.token_times)
    assert times[0] == record.first_s
    assert np.all(np.diff(times) >= 0)
