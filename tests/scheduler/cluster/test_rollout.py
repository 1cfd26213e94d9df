"""Where requests go while bytes are on their way, and whether a plan is worth its moves."""

from types import MappingProxyType

import pytest

from scheduler.cluster.coordinator.interim import interim_shares
from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.coordinator.replan import Replanner, ReplanOptions
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Problem, Utilisation
from scheduler.cluster.state import Demand, NodeState, Placement, Share, Shares
from tests.scheduler.cluster.lossy import MIB, POINTS, adapter

HELD, PULLING = Copy.HELD, Copy.PULLING


def _shares(**parts: float) -> Shares:
    return tuple(Share(node, part) for node, part in parts.items())


@pytest.mark.parametrize(
    ("target", "routes", "copies", "expected"),
    [
        pytest.param(_shares(a=1.0), (), {"a": HELD}, {"a": 1.0}, id="all is there"),
        pytest.param(
            _shares(b=1.0), _shares(a=1.0), {"a": HELD, "b": PULLING}, {"a": 1.0}, id="the old home stands in"
        ),
        pytest.param(
            _shares(b=0.5, c=0.5),
            _shares(a=1.0),
            {"a": HELD, "b": HELD},
            {"b": 0.5, "a": 0.5},
            id="share by share",
        ),
        pytest.param(
            _shares(a=0.5, b=0.5),
            _shares(a=1.0),
            {"a": HELD, "b": PULLING},
            {"a": 1.0},
            id="one home becomes two",
        ),
        pytest.param(
            _shares(b=1.0), _shares(a=1.0), {"b": PULLING}, {"b": 1.0}, id="no home but one to come"
        ),
        pytest.param(
            _shares(b=1.0), _shares(a=1.0), {"c": HELD, "b": PULLING}, {"c": 1.0}, id="whoever has it"
        ),
        pytest.param(_shares(b=1.0), (), {"c": PULLING}, {"c": 1.0}, id="whoever will have it"),
        pytest.param(_shares(b=1.0), (), {}, {"b": 1.0}, id="nobody has it"),
        pytest.param(
            _shares(a=0.5, b=0.5),
            _shares(c=1.0),
            {"a": HELD, "b": PULLING},
            {"a": 1.0},
            id="the old home is gone",
        ),
    ],
)
def test_requests_go_where_the_adapter_is(
    target: Shares, routes: Shares, copies: dict[str, Copy], expected: dict[str, float]
) -> None:
    found = interim_shares(target, routes, copies)
    assert {share.node: share.part for share in found} == pytest.approx(expected)


class _Fixed:
    """Proposes what it is told, and counts how often it is asked."""

    def __init__(self, placement: Placement) -> None:
        self.placement, self.asked = placement, 0

    def place(self, problem: Problem) -> Placement:
        self.asked += 1
        return self.placement


BUSY, OTHER = adapter("busy"), adapter("other")


def _problem(busy: float, other: float) -> Problem:
    """Both adapters on n0, which sustains 26,000 tokens/s; n1 is empty."""
    nodes = (
        NodeState("n0", 100 * MIB, POINTS, held=(BUSY, OTHER)),
        NodeState("n1", 100 * MIB, POINTS),
    )
    before = Placement(MappingProxyType({BUSY: _shares(n0=1.0), OTHER: _shares(n0=1.0)}))
    return Problem(Demand(MappingProxyType({BUSY: busy, OTHER: other})), nodes, before)


def _planner() -> tuple[Replanner, _Fixed]:
    fixed = _Fixed(Placement(MappingProxyType({BUSY: _shares(n0=1.0), OTHER: _shares(n1=1.0)})))
    return Replanner(fixed, Utilisation(Kernel.EXACT), ReplanOptions()), fixed


def test_a_plan_whose_gain_is_below_its_churn_is_not_taken() -> None:
    """Moving half of all bytes must gain 5 % + 0.5 · 25 % = 17.5 % of the busiest node's load."""
    planner, fixed = _planner()
    assert planner.plan(_problem(17_000, 3_400), 0.0) is None
    assert planner.plan(_problem(17_000, 3_800), 0.0) is fixed.placement


def test_a_comfortable_cluster_is_not_even_planned_for() -> None:
    planner, fixed = _planner()
    assert planner.plan(_problem(6_000, 6_000), 0.0) is None
    assert fixed.asked == 0


def test_a_plan_that_must_be_is_taken_whatever_it_gains_but_only_once() -> None:
    planner, fixed = _planner()
    planner.hurry("node_left", must=True)
    assert planner.plan(_problem(1, 1), 0.0) is fixed.placement
    assert planner.plan(_problem(1, 1), 0.0) is None


def test_plans_come_at_their_interval_and_sooner_when_hurried() -> None:
    planner, _ = _planner()
    assert planner.due(0.0)
    planner.plan(_problem(1, 1), 0.0)
    assert not planner.due(9.0)
    assert planner.due(10.0)
    planner.hurry("demand")
    assert not planner.due(0.5)
    assert planner.due(1.0)
