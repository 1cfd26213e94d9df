"""Routing policies: what each promises, on loads small enough to reckon by hand."""

import gc
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.cost.profile import Lengths, Limits, Slo
from scheduler.cluster.routing.base import NodeLoad, NoNodeReachable, RouteRequest, RoutingPolicy
from scheduler.cluster.routing.baselines import (
    LeastLoadedRouting,
    ToppingsRouting,
    WeightedRouting,
)
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.load_view import LoadView
from scheduler.cluster.routing.predicted_cost import PredictedCostRouting
from scheduler.cluster.state import RoutingTable, Share
from tests.scheduler.cluster.lossy import adapter

MODEL = CostModel(Kernel.PADDED, 5e-3, 25e-6, 5e-6, 4e-8, 1.7e-6, 9e-9)
FORECAST = Forecast(MODEL, Lengths(1000, 200))
A = adapter("a", 8)
TABLE = RoutingTable(1, MappingProxyType({A: (Share("x", 0.75), Share("y", 0.25))}))
SLO = Slo(2.0, 0.1)


def _ours(forecast: Forecast) -> PredictedCostRouting:
    return PredictedCostRouting(CostEstimator(forecast), SLO)


POLICIES: list[RoutingPolicy] = [
    WeightedRouting(),
    LeastLoadedRouting(),
    ToppingsRouting(MODEL, 100.0, 0.05),
    _ours(FORECAST),
]


def _load(requests: int, rank: int = 8, prompt_tokens: int = 0) -> NodeLoad:
    return NodeLoad(requests, StepLoad((AdapterLoad(rank, prompt_tokens, requests),), requests * 500))


IDLE = {"x": _load(0), "y": _load(0), "z": _load(0)}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_routes_to_a_reachable_node_whatever_the_table_says(policy: RoutingPolicy) -> None:
    rng = np.random.default_rng(1)
    asks = [RouteRequest(ref, 10) for ref in (A, adapter("unknown"))]
    for reachable in (["z"], ["y", "z"], ["x", "y", "z"]):
        loads = {node: _load(3) for node in reachable}
        for ask in asks:
            assert policy.route(ask, TABLE, loads, rng) in reachable
    with pytest.raises(NoNodeReachable, match="'a'"):
        policy.route(RouteRequest(A, 10), TABLE, {}, rng)


def test_weights_hold_on_the_average() -> None:
    rng = np.random.default_rng(2)
    taken = Counter(WeightedRouting().route(RouteRequest(A, 10), TABLE, IDLE, rng) for _ in range(4000))
    assert set(taken) == {"x", "y"}
    assert taken["x"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_weights_give_the_share_of_a_lost_node_to_the_others() -> None:
    rng = np.random.default_rng(3)
    assert {
        WeightedRouting().route(RouteRequest(A, 10), TABLE, {"y": _load(9), "z": _load(0)}, rng)
        for _ in range(20)
    } == {"y"}


def test_least_loaded_takes_the_fewest_requests_among_the_shares() -> None:
    loads = {"x": _load(5), "y": _load(4), "z": _load(0)}
    assert LeastLoadedRouting().route(RouteRequest(A, 10), TABLE, loads, np.random.default_rng(0)) == "y"


def test_toppings_avoids_the_node_where_a_large_rank_slows_everybody() -> None:
    """Equal requests; a rank-128 adapter on small-rank x would pad all of them, on y it changes nothing."""
    big = adapter("big", 128)
    table = RoutingTable(1, MappingProxyType({big: (Share("x", 0.5), Share("y", 0.5))}))
    loads = {"x": _load(10, rank=8), "y": _load(10, rank=128)}
    policy = ToppingsRouting(MODEL, 100.0, 1.0)
    assert policy.route(RouteRequest(big, 10), table, loads, np.random.default_rng(0)) == "y"


def test_toppings_survives_empty_nodes_and_slos_that_all_break() -> None:
    rng = np.random.default_rng(0)
    hopeless = ToppingsRouting(MODEL, 100.0, 0.001)
    assert hopeless.route(RouteRequest(A, 10), TABLE, IDLE, rng) in ("x", "y")
    assert hopeless.route(RouteRequest(A, 10), TABLE, {"x": _load(90), "y": _load(4)}, rng) == "y"
    assert (
        ToppingsRouting(MODEL, 100.0, 0.05).route(
            RouteRequest(A, 10), TABLE, {"x": _load(3), "y": _load(0)}, rng
        )
        == "y"
    )


def _chosen(ask: RouteRequest, loads: Mapping[str, NodeLoad], kernel: Kernel = Kernel.PADDED) -> set[str]:
    table = RoutingTable(1, MappingProxyType({ask.adapter: (Share("x", 0.5), Share("y", 0.5))}))
    policy = _ours(Forecast(replace(MODEL, kernel=kernel), Lengths(1000, 200)))
    return {policy.route(ask, table, loads, np.random.default_rng(seed)) for seed in range(40)}


def test_predicted_avoids_a_queue_and_draws_between_nodes_alike() -> None:
    assert _chosen(RouteRequest(A, 500), {"x": _load(2, prompt_tokens=20_000), "y": _load(2)}) == {"y"}
    assert _chosen(RouteRequest(A, 500), {"x": _load(2), "y": _load(2), "z": _load(0)}) == {"x", "y"}


def test_predicted_spills_when_the_first_token_would_be_late_everywhere_in_the_plan() -> None:
    loads = {"x": _load(2, prompt_tokens=90_000), "y": _load(2, prompt_tokens=9_000), "z": _load(0)}
    assert _chosen(RouteRequest(A, 500), loads) == {"y"}
    loads = {node: _load(2, prompt_tokens=90_000) for node in ("x", "y")} | {"z": _load(0)}
    assert _chosen(RouteRequest(A, 500), loads) == {"z"}
    assert _chosen(
        RouteRequest(A, 500), {"x": _load(2, prompt_tokens=40_000), "z": _load(2, prompt_tokens=60_000)}
    ) == {"x"}


def test_predicted_does_not_spill_to_a_node_whose_memory_is_taken() -> None:
    late = {node: _load(2, prompt_tokens=90_000) for node in ("x", "y")}
    room = float(A.nbytes)
    assert _chosen(RouteRequest(A, 500), late | {"z": replace(_load(0), room_bytes=room + 1)}) == {"z"}
    assert "z" not in _chosen(RouteRequest(A, 500), late | {"z": replace(_load(0), room_bytes=room - 1)})
    waited_for = replace(_load(0), adapters=frozenset([A.digest]), room_bytes=0.0)
    assert "z" not in _chosen(RouteRequest(A, 500), late | {"z": waited_for})


def test_predicted_keeps_a_large_rank_from_small_ones_where_kernels_pad() -> None:
    """Y has more to do, but x's twenty sequences would all be padded to 128."""
    small = NodeLoad(20, StepLoad(tuple(AdapterLoad(8, 0, 1) for _ in range(20)), 10_000))
    large = NodeLoad(24, StepLoad(tuple(AdapterLoad(128, 0, 1) for _ in range(24)), 12_000))
    ask = RouteRequest(adapter("big", 128), 500)
    assert _chosen(ask, {"x": small, "y": large}) == {"y"}
    assert _chosen(ask, {"x": small, "y": large}, Kernel.EXACT) == {"x"}


def test_predicted_pads_others_rather_than_let_a_queue_grow_beyond_the_slo() -> None:
    """Y would be padded to 128, which costs its thirty sequences more than x's queue costs one request."""
    small = NodeLoad(30, StepLoad(tuple(AdapterLoad(8, 0, 1) for _ in range(30)), 15_000))
    ask = RouteRequest(adapter("big", 128), 500)
    for queued, chosen in ((20_000, "x"), (120_000, "y")):
        work = StepLoad((AdapterLoad(128, queued, 60),), 30_000)
        assert _chosen(ask, {"x": NodeLoad(60, work), "y": small}) == {chosen}


def _sequences(count: int, context_tokens: int) -> NodeLoad:
    """That many sequences decode, each with an adapter of rank 8."""
    return NodeLoad(count, StepLoad(tuple(AdapterLoad(8, 0, 1) for _ in range(count)), context_tokens))


def test_predicted_sees_that_a_node_without_kv_memory_keeps_requests_waiting() -> None:
    """Both read prompts at once; x has no K/V left for them."""
    table = RoutingTable(1, MappingProxyType({A: (Share("x", 0.5), Share("y", 0.5))}))
    tight = Forecast(MODEL, Lengths(1000, 200), Limits(2048, 25_000))
    full, other = _sequences(40, context_tokens=40_000), _sequences(48, context_tokens=24_000)
    rng = np.random.default_rng(0)
    assert _ours(tight).route(RouteRequest(A, 500), table, {"x": full, "y": other}, rng) == "y"
    assert _ours(FORECAST).route(RouteRequest(A, 500), table, {"x": full, "y": other}, rng) == "x"


def test_predicted_gathers_requests_of_one_adapter_where_that_saves_reading_it_again() -> None:
    parts = tuple(AdapterLoad(64, 0, 4) for _ in range(4))
    here = NodeLoad(16, StepLoad(parts, 8_000), frozenset([adapter("big", 64).digest]))
    other = NodeLoad(16, StepLoad(parts, 8_000))
    assert _chosen(RouteRequest(adapter("big", 64), 500), {"x": here, "y": other}) == {"x"}


def test_predicted_prefers_the_node_that_has_the_prefix() -> None:
    ask = RouteRequest(A, 4000, MappingProxyType({"y": 3900}))
    assert _chosen(ask, {"x": _load(3), "y": _load(3)}) == {"y"}


def test_a_request_that_its_homes_can_take_costs_no_more_in_a_larger_cluster() -> None:
    """Work is counted in function calls, which do not depend on the machine."""
    assert _calls_of_a_route(256) == _calls_of_a_route(4)


def test_a_request_that_spills_looks_at_no_more_nodes_in_a_larger_cluster() -> None:
    late = {node: _load(2, prompt_tokens=90_000) for node in ("x", "y")}
    looked_at = []
    for nodes in (20, 200):
        loads = _Seen(late | {f"n{at}": _load(2) for at in range(nodes)})
        assert _ours(FORECAST).route(RouteRequest(A, 500), TABLE, loads, np.random.default_rng(0)) not in late
        looked_at.append(loads.looked_at)
    assert max(looked_at) < 20


class _Seen(dict[str, NodeLoad]):
    """Loads that count how often one is looked at."""

    looked_at = 0

    def __getitem__(self, node: str) -> NodeLoad:
        self.looked_at += 1
        return super().__getitem__(node)


def _calls_of_a_route(nodes: int) -> int:
    said = {f"n{at}": _load(3) for at in range(nodes)}
    table = RoutingTable(1, MappingProxyType({A: (Share("n1", 0.5), Share("n2", 0.5))}))
    policy, view, rng, calls = _ours(FORECAST), LoadView(), np.random.default_rng(0), 0
    for node, load in said.items():
        view.hear(node, load, 0.0)

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    gc.disable()  # what it finalises would be counted
    sys.setprofile(count)
    node = policy.route(RouteRequest(A, 500), table, view.loads, rng)
    view.sent(node, RouteRequest(A, 500))
    sys.setprofile(None)
    gc.enable()
    return calls


@pytest.mark.parametrize("room", [{"seats": 40}, {"kv_tokens": 40 * 600.0}], ids=["seats", "K/V"])
def test_beyond_a_nodes_room_a_request_waits_for_the_part_of_an_answer_that_is_lacking(
    room: dict[str, float],
) -> None:
    """A full node frees as much as it has in the time that an answer of 200 tokens takes."""
    costs, ask = CostEstimator(FORECAST), RouteRequest(A, 500)
    loads = [replace(_sequences(count, count * 500), **room) for count in (30, 60)]
    free, taken = (costs.estimate(ask, "x", load) for load in loads)
    assert free[3] <= 1 < taken[3]
    assert free[0] < 0.5
    assert taken[0] == pytest.approx((taken[3] - 1) * 200 * taken[1])
