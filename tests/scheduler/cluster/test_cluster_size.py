"""How many nodes a demand needs: by load, by pace, by memory, and by what is refused."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from lora.adapter import BASE, AdapterRef
from scheduler.cluster.coordinator.cluster_size import ClusterSize, WantedSize
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.coordinator.node_need import NeededNodes, NodeNeed
from scheduler.cluster.coordinator.size_keeper import SizeBounds
from scheduler.cluster.placement.balanced import BalancedPlacement, StepMeasure
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.protocol.messages import NodeHardware, Report, RouterReport, Tick
from scheduler.cluster.state import EMPTY_PLACEMENT, Demand, NodeState, Placement
from tests.scheduler.cluster.lossy import FORECAST, MIB, POINTS, adapter, make_coordinator

TBT_S = 0.05
REFS = [adapter(f"a{at}", rank) for at, rank in enumerate([8, 8, 16, 16, 32, 64])]
BOUNDS = SizeBounds(1, 8, grow_after_s=10.0, shrink_after_s=60.0)
ROOM = 4096 * MIB


def node_need() -> NodeNeed:
    return NodeNeed(BalancedPlacement(FORECAST), StepMeasure(FORECAST, TBT_S))


def states(count: int, slowdown: float = 1.0, memory_bytes: int = ROOM) -> tuple[NodeState, ...]:
    return tuple(NodeState(f"n{at}", memory_bytes, POINTS, slowdown) for at in range(count))


def problem_of(
    rates: Mapping[AdapterRef, float], nodes: tuple[NodeState, ...], factor: float = 1.0
) -> Problem:
    demand = Demand(MappingProxyType({ref: rate * factor for ref, rate in rates.items()}))
    return Problem(demand, nodes, EMPTY_PLACEMENT)


def evenly(tokens_per_s: float) -> dict[AdapterRef, float]:
    return dict.fromkeys(REFS, tokens_per_s / len(REFS))


def least(problem: Problem, base: float = 0.0) -> NeededNodes:
    return node_need().least(problem, base, 1, 16)


def test_the_need_grows_with_the_demand_and_is_the_fewest_that_do() -> None:
    needs = [least(problem_of(evenly(rate), states(2))).nodes for rate in (0, 5e3, 2e4, 4e4, 8e4)]
    assert needs == sorted(needs)
    assert needs[0] == 1
    assert 3 < needs[-1] < 16
    problem, need = problem_of(evenly(8e4), states(2)), node_need()
    assert need.lacks(problem, 0.0, needs[-1]) is None
    assert need.lacks(problem, 0.0, needs[-1] - 1) == "load"
    assert need.lacks(problem, 0.0, needs[-1], margin=0.3) == "load"


def test_the_base_model_is_demand_too() -> None:
    assert least(problem_of(evenly(0), states(1)), 8e4).nodes > least(problem_of(evenly(0), states(1))).nodes


def test_slow_nodes_do_less_and_one_that_is_never_in_time_does_nothing() -> None:
    fast = least(problem_of(evenly(4e4), states(3))).nodes
    assert least(problem_of(evenly(4e4), states(3, slowdown=2.0))).nodes > fast
    stuck = NodeState("stuck", ROOM, POINTS, slowdown=20.0)
    assert least(problem_of(evenly(4e4), (*states(2), stuck))).nodes == fast + 1


def test_what_is_asked_for_must_fit_and_what_is_not_need_not() -> None:
    many = [adapter(f"b{at}", 64) for at in range(32)]  # 2 GiB in all
    small = states(1, memory_bytes=768 * MIB)
    assert least(problem_of(dict.fromkeys(many, 2.0), small)) == NeededNodes(3, "memory")
    assert least(problem_of(dict.fromkeys(many, 0.01), small)) == NeededNodes(1, "load")


class Town:
    """Clients that ask for so much, and a launcher that runs as many nodes as it is told."""

    def __init__(self, begin: int = 1) -> None:
        self.now, self.running = 1000.0, begin
        self.rates: dict[AdapterRef, float] = evenly(0)
        self._placed: tuple[object, Placement] = (None, EMPTY_PLACEMENT)
        self.size = self.begin()

    def begin(self) -> ClusterSize:
        """Let another coordinator begin, that knows nothing."""
        self.size = ClusterSize(lambda now: self._problem(), node_need())
        return self.size

    def _problem(self) -> Problem:
        """Return the demand and the nodes, and the placement that is best for them."""
        problem, given = problem_of(self.rates, states(self.running)), (self.rates, self.running)
        if self._placed[0] != given:
            self._placed = (given, BalancedPlacement(FORECAST).place(problem))
        return replace(problem, previous=self._placed[1])

    def run(
        self, seconds: int, refused: float = 0.0, factor: float = 1.0, base: float = 0.0, every: int = 1
    ) -> list[int]:
        """Let time pass; return how many nodes were wanted each time that the launcher asked."""
        wanted: list[int] = []
        for at in range(seconds):
            self.now += 1.0
            asked = [(ref, int(rate * factor)) for ref, rate in self.rates.items()]
            self.size.count([*asked, (BASE, int(base))], False, self.now)
            self.size.count([(REFS[0], int(refused))], True, self.now)
            if at % every:
                continue
            told: WantedSize = self.size.ask(BOUNDS, self.running, self.now)
            self.running = told.wanted
            wanted.append(told.wanted)
        return wanted


def test_it_grows_while_much_is_asked_for_and_shrinks_to_the_least_one_by_one() -> None:
    town = Town()
    town.rates = evenly(8e4)
    grown = town.run(60)
    assert grown[5] == 1
    assert grown[-1] > 3
    assert town.size.told is not None
    assert town.size.told.last.reason == "load"
    town.rates = evenly(0)
    shrunk = town.run(700)
    assert shrunk[-1] == 1
    assert {a - b for a, b in pairwise(shrunk)} <= {0, 1}
    assert town.size.told.last.reason == "calm"


def test_a_steady_load_with_noise_does_not_make_it_flap() -> None:
    town, rng = Town(), np.random.default_rng(3)
    town.rates = evenly(4e4)
    town.run(120)
    seen: list[int] = []
    for _ in range(30):
        seen += town.run(10, factor=float(rng.uniform(0.85, 1.15)))
    assert max(seen) - min(seen) <= 1
    assert sum(a != b for a, b in pairwise(seen)) <= 1


def test_tokens_of_the_base_model_alone_bring_nodes() -> None:
    town = Town()
    assert town.run(60, base=8e4)[-1] > 3


def test_adapters_that_nobody_has_asked_for_bring_none() -> None:
    town = Town()
    town.rates = {adapter(f"c{at}"): 100.0 for at in range(600)}  # what a placement plans for them
    assert set(town.run(60, factor=0.0)) == {1}


def test_what_is_refused_for_long_brings_a_node_though_steps_are_short() -> None:
    town = Town()
    town.rates = evenly(1000)
    assert set(town.run(30)) == {1}
    assert town.run(12, refused=200)[-1] == 2
    assert town.size.told is not None
    assert town.size.told.last.reason == "refused"
    assert set(town.run(200)) == {2}, "one alone refused as much"


def test_what_was_refused_soon_after_the_beginning_does_not_hold_a_node_for_little() -> None:
    town = Town()
    town.rates = evenly(2000)
    town.run(1)
    assert town.run(13, refused=2000)[-1] == 2
    town.rates = evenly(2200)
    assert town.run(300)[-1] == 1


def test_a_launcher_that_asks_seldom_is_told_of_refusals_too() -> None:
    town = Town()
    town.rates = evenly(1000)
    town.run(30)
    assert town.run(19, refused=200, every=9)[-1] == 2


def test_what_is_refused_once_brings_none() -> None:
    town = Town()
    town.rates = evenly(1000)
    town.run(30)
    assert set(town.run(1, refused=20_000) + town.run(30)) == {1}


def test_a_coordinator_that_begins_anew_keeps_as_many_as_run() -> None:
    town = Town()
    town.rates = evenly(4e4)
    before = town.run(120)[-1]
    assert before > 1
    town.begin()
    assert set(town.run(50)) == {before}
    assert town.size.told is not None
    assert town.size.told.last.reason == "start"


def test_while_nobody_asks_there_is_no_number() -> None:
    coordinator = make_coordinator()
    coordinator.on_event(Tick(), 1.0)
    assert coordinator.size.told is None


def asked_after(coordinator: Coordinator, refused: tuple[int, ...]) -> int:
    """Let a router say what it refused in all, second by second; return how many nodes are wanted then."""
    wanted = 0
    machine = NodeHardware(ROOM, POINTS)
    for at, total in enumerate(refused):
        now = 1.0 + at
        coordinator.on_event(Report("n0", 1 << 33, at + 1, machine), now)
        coordinator.on_event(RouterReport("r", 0, 1, ((BASE, total),)), now)
        wanted = coordinator.size.ask(BOUNDS, 1, now).wanted
    return wanted


def test_what_a_router_refused_before_a_coordinator_began_is_no_news_to_it() -> None:
    assert asked_after(make_coordinator(epoch=1), (10_000_000,) * 30) == 1
    assert asked_after(make_coordinator(epoch=1), tuple(range(10_000_000, 10_060_000, 2000))) == 2
