"""The simulated cluster: hand-reckoned on an idle node, and under faults everything that must hold does."""

import numpy as np
import pytest

from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import AdapterLoad, Kernel, StepLoad
from scheduler.cluster.cost.profile import Lengths, Slo
from scheduler.cluster.placement.baselines import RandomPlacement
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.router import RouterOptions
from scheduler.cluster.routing.slo_admission import SloAdmission
from scheduler.sim.network import NetworkTimes
from scheduler.sim.outcome import Outcome, summary
from scheduler.sim.simulator import Simulator
from scheduler.sim.spec import Fault, FaultKind, SimulatorSpec
from scheduler.sim.workload.popularity import FlashCrowd, PowerLaw, assigned
from scheduler.sim.workload.trace import Arrival, Call, poisson
from tests.scheduler.sim.clusters import (
    MIB,
    PROFILE,
    adapters,
    chaos,
    node_spec,
    routers,
    simulator_spec,
    traffic,
)


def _run(
    spec: SimulatorSpec, arrivals: list[Arrival], seconds: float, seed: int = 0, audit: bool = True
) -> Simulator:
    simulator = Simulator(spec, seed, audit=audit, keep_history=True)
    simulator.run(arrivals, seconds)
    return simulator


def _figures(simulator: Simulator, seconds: float) -> Outcome:
    return summary(simulator.records.values(), PROFILE.slo, seconds)


def test_a_lone_request_takes_what_the_cost_model_says_and_three_messages() -> None:
    refs = adapters(1)
    spec = simulator_spec(1, refs)
    simulator = _run(spec, [Arrival("r", Call(20.0, 3000, 5), refs[0])], 40.0)
    record, model = simulator.records["r"], spec.node.model

    def step_s(rows: int, decoding: int, context: int) -> float:
        return model.step_s(StepLoad((AdapterLoad(8, rows, decoding),), context))

    wire_s = 2 * NetworkTimes().latency_s
    assert record.ttft_s == pytest.approx(step_s(2048, 0, 2048) + step_s(952, 0, 3000) + wire_s)
    assert record.end_s is not None
    assert record.first_s is not None
    decode_s = sum(step_s(0, 1, 3001 + at) for at in range(4))
    assert record.end_s - record.first_s == pytest.approx(decode_s)


@pytest.mark.slow
def test_without_faults_everything_is_served_and_adapters_are_where_the_table_says() -> None:
    refs = adapters()
    simulator = _run(simulator_spec(4, refs), traffic(refs, 15.0, 30.0, seed=1), 30.0)
    figures = _figures(simulator, 30.0)
    assert figures.served == figures.requests > 350
    assert simulator.cluster.coordinator is not None
    for ref, shares in simulator.cluster.coordinator.table.shares.items():
        assert all(ref.digest in simulator.cluster.nodes[share.node].store.ready for share in shares)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_under_faults_every_request_is_answered_once_and_every_promise_holds(seed: int) -> None:
    """The simulator checks after every event, and `run` that nothing stays unanswered."""
    spec, arrivals = chaos(seed)
    simulator = _run(spec, arrivals, 40.0, seed)
    assert sorted(simulator.records) == sorted(arrival.name for arrival in arrivals)
    assert all(record.end_s is not None for record in simulator.records.values())
    assert sum(record.served for record in simulator.records.values()) > len(arrivals) / 2


def test_a_stream_outlives_a_cut_too_short_to_be_noticed() -> None:
    refs = adapters(4)
    cut = Fault(FaultKind.PARTITION, 20.05, 0.5, ("n0", "n1"))
    spec = simulator_spec(2, refs, faults=(cut,))
    simulator = _run(spec, [Arrival("r", Call(20.0, 100, 15), refs[0])], 40.0)
    assert simulator.records["r"].served


@pytest.mark.slow
def test_the_same_seed_gives_the_same_history_byte_for_byte() -> None:
    seed = 4
    spec, arrivals = chaos(seed)
    one, other = (_run(spec, arrivals, 40.0, seed, audit=False) for _ in range(2))
    assert "".join(one.history.lines) == "".join(other.history.lines)
    assert one.history.digest() == other.history.digest()
    assert len(one.history.lines) > len(arrivals)
    assert _run(spec, arrivals, 40.0, seed + 1, audit=False).history.digest() != one.history.digest()


def test_streams_of_a_node_that_dies_go_on_elsewhere_and_none_is_lost() -> None:
    refs = adapters(2)
    arrivals = [Arrival(f"r{at}", Call(20.0 + at / 10, 500, 400), refs[0]) for at in range(20)]
    fault = Fault(FaultKind.CRASH, 21.5, 30.0, ("n0",))
    simulator = _run(simulator_spec(2, refs, faults=(fault,)), arrivals, 60.0)
    assert all(record.served for record in simulator.records.values())
    begun_before = [
        record for record in simulator.records.values() if record.first_s and record.first_s < 21.5
    ]
    assert len(begun_before) > 5
    assert all(len(record.token_times) == 400 for record in simulator.records.values()), (
        "each token comes once"
    )


@pytest.mark.slow
def test_restarting_every_node_in_turn_loses_nothing() -> None:
    refs = adapters(12)
    faults = tuple(Fault(FaultKind.RESTART, 15.0 + 12 * at, 1.0, (f"n{at}",)) for at in range(3))
    simulator = _run(simulator_spec(3, refs, faults=faults), traffic(refs, 10.0, 60.0, seed=7), 60.0)
    left = [line for line in simulator.history.lines if line.endswith(" left\n")]
    assert len(left) == 3
    assert all(record.served for record in simulator.records.values())
    assert all(node.up for node in simulator.cluster.nodes.values())


@pytest.mark.slow
def test_only_clients_of_a_router_that_dies_lose_their_connection() -> None:
    refs = adapters(4)
    fault = Fault(FaultKind.ROUTER, 20.0, 5.0, ("r0",))
    simulator = _run(simulator_spec(2, refs, faults=(fault,)), traffic(refs, 20.0, 40.0, seed=8), 40.0)
    lost = [record for record in simulator.records.values() if not record.served]
    assert 0 < len(lost) < 40
    assert all(record.end_s == 20.0 for record in lost)


@pytest.mark.slow
def test_after_an_overload_all_are_in_time_again_within_ten_seconds() -> None:
    """A third of a minute at several times of what two nodes can do, then a load that they carry."""
    refs, slo = adapters(8), Slo(2.0, 0.1)
    forecast = Forecast(node_spec().model, Lengths(2000, 60))
    make = routers(forecast, lambda: SloAdmission(CostEstimator(forecast), slo))
    rng = np.random.default_rng(9)
    calls = [
        each.at(each.arrival_s + start_s)
        for start_s, rate, seconds in ((10.0, 15, 10.0), (20.0, 150, 10.0), (30.0, 15, 30.0))
        for each in poisson(rate, seconds, (2000, 60), rng)
    ]
    arrivals = list(assigned(calls, refs, PowerLaw(0.4), rng))
    simulator = _run(simulator_spec(2, refs, router=make), arrivals, 60.0, audit=False)
    during = _part_in_time(simulator, 20.0, 30.0, slo)
    after = _part_in_time(simulator, 40.0, 60.0, slo)
    assert 0.1 < during < 0.9, "it is an overload"
    assert after > 0.95


def _part_in_time(simulator: Simulator, from_s: float, to_s: float, slo: Slo) -> float:
    records = [r for r in simulator.records.values() if from_s <= r.arrival.call.arrival_s < to_s]
    in_time = [r for r in records if r.served and r.ttft_s <= slo.ttft_s and r.tbt_s <= slo.tbt_s]
    return len(in_time) / len(records)


@pytest.mark.slow
def test_a_partition_loses_no_request() -> None:
    refs = adapters(6)
    fault = Fault(FaultKind.PARTITION, 15.0, 12.0, ("n0",))
    arrivals = traffic(refs, 8.0, 50.0, seed=2)
    simulator = _run(simulator_spec(3, refs, faults=(fault,)), arrivals, 50.0)
    assert all(record.served for record in simulator.records.values())


def test_what_an_earlier_attempt_says_is_not_heard() -> None:
    """A cut shorter than the time to notice it: the request is sent again while the first attempt still runs."""
    refs = adapters(2)
    arrivals = [Arrival(f"r{at}", Call(18.0 + at / 20, 200, 100 + 3 * at), refs[0]) for at in range(60)]
    cuts = tuple(Fault(FaultKind.PARTITION, 19.0 + at / 2, 0.1, ("n0",)) for at in range(6))
    simulator = _run(simulator_spec(2, refs, faults=cuts), arrivals, 50.0)
    assert all(record.served for record in simulator.records.values())


@pytest.mark.slow
def test_without_a_coordinator_the_data_path_goes_on() -> None:
    refs = adapters(12)
    fault = Fault(FaultKind.COORDINATOR, 15.0, 25.0)
    simulator = _run(simulator_spec(3, refs, faults=(fault,)), traffic(refs, 10.0, 60.0, seed=3), 60.0)
    assert all(record.served for record in simulator.records.values())
    assert not any("Pull" in line for line in simulator.history.lines if float(line.split()[0]) > 45.0)


def test_a_node_that_leaves_is_let_go_and_no_request_is_lost() -> None:
    refs = adapters(12)
    fault = Fault(FaultKind.LEAVE, 15.0, 1.0, ("n1",))
    simulator = _run(simulator_spec(3, refs, faults=(fault,)), traffic(refs, 10.0, 50.0, seed=4), 50.0)
    assert any(line.endswith("n1 left\n") for line in simulator.history.lines)
    assert all(record.served for record in simulator.records.values())


@pytest.mark.slow
def test_a_flash_crowd_gets_more_copies() -> None:
    refs = adapters(12)
    asked, rng = refs[-1], np.random.default_rng(6)
    spec = simulator_spec(4, refs, node_spec(memory_bytes=256 * MIB))  # about half of all adapters
    law = FlashCrowd(PowerLaw(0.4), len(refs) - 1, (0.5, 1.0), 0.8)
    crowd = list(assigned(poisson(60.0, 40.0, (600, 60), rng), refs, law, rng))
    simulator, homes = Simulator(spec, 0), list[set[str]]()

    def look() -> None:
        cluster = simulator.cluster
        assert cluster.coordinator is not None
        homes.append({share.node for share in cluster.coordinator.table.shares[asked]})
        assert all(asked.digest in cluster.nodes[home].store.ready for home in homes[-1])

    for at_s in (19.9, 40.0):
        simulator.clock.at(at_s, look)
    simulator.run(crowd, 40.0)
    assert all(record.served for record in simulator.records.values())
    before, after = homes
    assert len(before) == 1
    assert len(after) >= 2


@pytest.mark.slow
def test_placing_by_rank_beats_chance_where_kernels_pad() -> None:
    refs = adapters(30)
    arrivals = traffic(refs, 45.0, 20.0, seed=5)
    node = node_spec(Kernel.PADDED)
    ours = _figures(_run(simulator_spec(2, refs, node), arrivals, 20.0, audit=False), 20.0)
    chance = RandomPlacement(np.random.default_rng(0))
    theirs = _figures(_run(simulator_spec(2, refs, node, chance), arrivals, 20.0, audit=False), 20.0)
    assert ours.tbt_p95_s < theirs.tbt_p95_s


def test_nobody_is_home() -> None:
    refs = adapters(1)
    fault = Fault(FaultKind.CRASH, 5.0, 90.0, ("n0",))
    simulator = _run(
        simulator_spec(1, refs, faults=(fault,)), [Arrival("r", Call(10.0, 5, 5), refs[0])], 60.0
    )
    assert not simulator.records["r"].served
    assert simulator.records["r"].end_s == 10.0 + RouterOptions().patience_s
