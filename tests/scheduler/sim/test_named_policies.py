"""Every named policy, composed as named, serves a small cluster and keeps every promise on the way."""

from dataclasses import replace

import pytest

from scheduler.cluster.policies import Setting
from scheduler.sim.ablations.named_policies import (
    ABLATIONS,
    BASELINES,
    POLICIES,
    NoKnownRates,
    UnknownPolicy,
    named,
)
from scheduler.sim.ablations.oracle_demand import oracle_rates
from scheduler.sim.memory.store import StoreSpec
from scheduler.sim.simulator import Simulator
from scheduler.sim.workload.trace import Arrival, Call
from tests.scheduler.sim.clusters import PROFILE, adapters, node_spec, simulator_spec, traffic


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_everything_when_there_is_room(name: str) -> None:
    refs, policy = adapters(12), named(name)
    arrivals = traffic(refs, 4.0, 20.0, seed=1)
    node = replace(node_spec(), store=StoreSpec(policy=policy.residency))
    setting = Setting(node.model, PROFILE.slo, 40.0, seed=1, known_rates=oracle_rates(arrivals))
    spec = simulator_spec(3, refs, node)
    spec = replace(spec, coordinator=policy.coordinator(setting), router=policy.router(setting))
    simulator = Simulator(spec, 1, audit=True)
    simulator.run(arrivals, 20.0)
    assert all(record.served for record in simulator.records.values())


def test_names_are_known_or_refused() -> None:
    assert set(POLICIES) == {"ours", *BASELINES, *ABLATIONS}
    assert all(policy.name == name for name, policy in POLICIES.items())
    with pytest.raises(UnknownPolicy, match="choose from ours, paper"):
        named("best")


def test_the_future_is_only_known_in_replays() -> None:
    setting = Setting(node_spec().model, PROFILE.slo)
    with pytest.raises(NoKnownRates, match="known_rates"):
        named("ours-oracle-demand").coordinator(setting)(0)


def test_known_rates_are_the_tokens_to_come_over_the_time() -> None:
    one, other = adapters(2)
    calls = [Call(1.0, 10, 5), Call(2.0, 20, 10), Call(3.0, 40, 2)]
    arrivals = [
        Arrival(str(at), call, ref)
        for at, (call, ref) in enumerate(zip(calls, (one, other, one), strict=True))
    ]
    assert oracle_rates(arrivals)(1.0, 3.0) == {one: 7.5, other: 15.0}
    assert oracle_rates(arrivals)(3.0, 5.0) == {one: 21.0}
