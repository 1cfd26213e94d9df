"""Simulated nodes learn what their steps cost, and tell it: nobody tells them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.routing.base import NodeLoad
from scheduler.sim.simulator import Simulator
from scheduler.sim.spec import Fault, FaultKind
from scheduler.sim.true_costs import Deviation
from tests.scheduler.sim.clusters import PROFILE, adapters, node_spec, simulator_spec, traffic


def _told(simulator: Simulator, node: str, at_s: float) -> Callable[[], tuple[NodeLoad, float]]:
    """Have what the node tells routers and the coordinator at that second kept."""
    kept: list[tuple[NodeLoad, float]] = []

    def look() -> None:
        there = simulator.cluster.nodes[node]
        kept.append((there.load(), there.report().slowdown))

    simulator.clock.at(at_s, look)
    return lambda: kept[0]


@pytest.mark.slow
def test_a_slow_node_finds_out_by_itself_and_again_when_it_is_over() -> None:
    refs = adapters()
    slow = Fault(FaultKind.SLOW, 8.0, 12.0, ("n0",), factor=4.0)
    simulator = Simulator(simulator_spec(2, refs, faults=(slow,)), seed=1)
    before, during, after = (_told(simulator, "n0", at_s) for at_s in (7.9, 19.9, 35.0))
    simulator.run(traffic(refs, 12.0, 36.0, seed=1), 36.0)
    for told, factor in ((before, 1.0), (during, 4.0), (after, 1.0)):
        load, slowdown = told()
        assert slowdown == pytest.approx(factor, rel=0.1)
        assert load.pace.fixed == pytest.approx(factor, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("true", list(Kernel))
def test_nodes_that_were_profiled_with_other_kernels_find_out(true: Kernel) -> None:
    told = Kernel.MULTI_RANK if true is Kernel.EXACT else Kernel.EXACT
    node = replace(node_spec(told), deviation=Deviation(model=PROFILE.model(true)), others=PROFILE.models)
    refs = adapters()
    simulator = Simulator(simulator_spec(2, refs, node), seed=2)
    looks = [_told(simulator, name, 29.9) for name in ("n0", "n1")]
    simulator.run(traffic(refs, 40.0, 30.0, seed=2), 30.0)
    assert {look()[0].kernel for look in looks} == {true}
