"""Routing policies: what each promises, on loads small enough to reckon by hand."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from scheduler.cluster.cost.forecast import Forecast, ForecastBatch
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.profile import Lengths, Limits
from scheduler.cluster.routing.base import NodeLoad, NoNodeReachable, Outlook, RouteRequest, RoutingPolicy
from scheduler.cluster.routing.baselines import (
    LeastLoadedRouting,
    ToppingsRouting,
    WeightedRouting,
)
from scheduler.cluster.routing.predicted_cost import CostEstimator, PredictedCostRouting
from scheduler.cluster.state import RoutingTable, Share, normalised
from tests.scheduler.cluster.lossy import adapter

MODEL = CostModel(Kernel.PADDED, 5e-3, 25e-6, 5e-6, 4e-8, 1.7e-6, 9e-9)
FORECAST = Forecast(MODEL, Lengths(1000, 200))
A = adapter("a", 8)
TABLE = RoutingTable(1, MappingProxyType({A: (Share("x", 0.75), Share("y", 0.25))}))
POLICIES: list[RoutingPolicy] = [
    WeightedRouting(),
    LeastLoadedRouting(),
    ToppingsRouting(MODEL, 100.0, 0.05),
    PredictedCostRouting(FORECAST),
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
    policy = PredictedCostRouting(Forecast(replace(MODEL, kernel=kernel), Lengths(1000, 200)))
    return {policy.route(ask, table, loads, np.random.default_rng(seed)) for seed in range(40)}


def test_predicted_avoids_a_queue_and_draws_between_nodes_alike() -> None:
    assert _chosen(RouteRequest(A, 500), {"x": _load(2, prompt_tokens=20_000), "y": _load(2)}) == {"y"}
    assert _chosen(RouteRequest(A, 500), {"x": _load(2), "y": _load(2), "z": _load(0)}) == {"x", "y"}


def test_predicted_spills_when_the_first_token_would_be_late_everywhere_in_the_plan() -> None:
    loads = {"x": _load(2, prompt_tokens=19_000), "y": _load(2, prompt_tokens=9_000), "z": _load(0)}
    assert _chosen(RouteRequest(A, 500), loads) == {"y"}
    loads = {node: _load(2, prompt_tokens=19_000) for node in ("x", "y")} | {"z": _load(0)}
    assert _chosen(RouteRequest(A, 500), loads) == {"z"}
    assert _chosen(
        RouteRequest(A, 500), {"x": _load(2, prompt_tokens=40_000), "z": _load(2, prompt_tokens=60_000)}
    ) == {"x"}


def test_predicted_does_not_spill_to_a_node_whose_memory_is_taken() -> None:
    late = {node: _load(2, prompt_tokens=19_000) for node in ("x", "y")}
    for_each_door = 3.0 * A.nbytes
    assert _chosen(RouteRequest(A, 500), late | {"z": replace(_load(0), room_bytes=for_each_door + 1)}) == {
        "z"
    }
    assert "z" not in _chosen(
        RouteRequest(A, 500), late | {"z": replace(_load(0), room_bytes=for_each_door - 1)}
    )
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
    assert PredictedCostRouting(tight).route(RouteRequest(A, 500), table, {"x": full, "y": other}, rng) == "y"
    assert (
        PredictedCostRouting(FORECAST).route(RouteRequest(A, 500), table, {"x": full, "y": other}, rng) == "x"
    )


def test_predicted_gathers_requests_of_one_adapter_where_that_saves_reading_it_again() -> None:
    parts = tuple(AdapterLoad(64, 0, 4) for _ in range(4))
    here = NodeLoad(16, StepLoad(parts, 8_000), frozenset([adapter("big", 64).digest]))
    other = NodeLoad(16, StepLoad(parts, 8_000))
    assert _chosen(RouteRequest(adapter("big", 64), 500), {"x": here, "y": other}) == {"x"}


def test_predicted_prefers_the_node_that_has_the_prefix() -> None:
    ask = RouteRequest(A, 4000, MappingProxyType({"y": 3900}))
    assert _chosen(ask, {"x": _load(3), "y": _load(3)}) == {"y"}


def _cluster(nodes: int, rng: np.random.Generator) -> dict[str, NodeLoad]:
    """Loads from idle to far too much, some without room."""
    return {
        f"n{at:03d}": replace(
            _load(int(rng.integers(40)), int(rng.choice([8, 64, 128])), int(rng.integers(30_000))),
            room_bytes=float(rng.choice([0.0, 1e8, 1e12])),
        )
        for at in range(nodes)
    }


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_decides_alike_whether_loads_are_listed_or_looked_up(policy: RoutingPolicy) -> None:
    rng = np.random.default_rng(7)
    for seed in range(60):
        said = _cluster(6, rng)
        names, outlook = list(said), Outlook()
        outlook.hear(said)
        for _ in range(int(rng.integers(4))):
            outlook.sent(names[int(rng.integers(6))], RouteRequest(adapter("b", 64), 3000))
        cut = {name for name in names if rng.random() < 0.3}
        listed = {name: outlook.of(name) for name in names if name not in cut}
        looked_up = outlook.reachable(lambda name, cut=cut: name not in cut)
        assert dict(looked_up) == listed
        assert (len(looked_up), bool(looked_up)) == (len(listed), bool(listed))
        shares = normalised((name, float(rng.random())) for name in names[: int(rng.integers(4))])
        table = RoutingTable(1, MappingProxyType({A: shares}))
        if listed:
            found = [
                policy.route(RouteRequest(A, 700), table, loads, np.random.default_rng(seed))
                for loads in (listed, looked_up)
            ]
            assert found[0] == found[1]


def test_a_request_that_its_homes_can_take_costs_no_more_in_a_larger_cluster() -> None:
    """Work is counted in function calls, which do not depend on the machine."""
    assert _calls_of_a_route(256) == _calls_of_a_route(4)


def _calls_of_a_route(nodes: int) -> int:
    said = {f"n{at}": _load(3) for at in range(nodes)}
    table = RoutingTable(1, MappingProxyType({A: (Share("n1", 0.5), Share("n2", 0.5))}))
    policy, outlook, rng, calls = PredictedCostRouting(FORECAST), Outlook(), np.random.default_rng(0), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    outlook.hear(said)
    node = policy.route(RouteRequest(A, 500), table, outlook.reachable(lambda name: True), rng)
    outlook.sent(node, RouteRequest(A, 500))
    sys.setprofile(None)
    return calls


def test_an_outlook_adds_what_was_sent_since_nodes_spoke_for_every_front_door() -> None:
    outlook, said = Outlook(), {"x": _load(2), "y": _load(2)}
    outlook.hear(said)
    outlook.sent("x", RouteRequest(A, 500))
    outlook.sent("x", RouteRequest(A, 300))
    assert outlook.of("y") == said["y"]
    assert outlook.of("x").requests == 2 + 2 * 2
    assert sum(part.prefill_tokens for part in outlook.of("x").work.adapters) == 2 * 800
    assert sorted(part.rank for part in outlook.of("x").work.adapters) == [0, 8, 8], (
        "the second adds no adapter"
    )
    outlook.hear(said)
    assert outlook.of("x").requests == 6
    outlook.hear(dict(said))
    assert outlook.of("x") == said["x"]


@pytest.mark.parametrize("kernel", list(Kernel))
def test_an_estimate_is_what_the_forecast_says_of_the_batch_with_one_more(kernel: Kernel) -> None:
    """The quick way, which keeps what follows from a load, against the plain one."""
    rng = np.random.default_rng(3)
    forecast = Forecast(MODEL, Lengths(1000, 200), Limits(2048, 60_000))
    estimator = CostEstimator(forecast)
    for _ in range(200):
        pace = Pace(*rng.uniform(0.5, 3.0, 3).tolist()).rounded()
        ranks = rng.choice([8, 16, 64, 128], rng.integers(1, 8)).tolist()
        parts = tuple(AdapterLoad(r, int(rng.choice([0, 700])), int(rng.integers(1, 9))) for r in ranks)
        digests = frozenset({A.digest} if rng.random() < 0.5 else ())
        load = NodeLoad(3, StepLoad(parts, int(rng.integers(80_000))), digests, kernel=kernel, pace=pace)
        ask = RouteRequest(A, int(rng.integers(1, 5000)), MappingProxyType({"n": int(rng.integers(900))}))
        for fetch_s in (0.0, 0.5):
            found = estimator.estimate(ask, "n", load, fetch_s)
            assert found == pytest.approx(_plain(ask, load, forecast.of(kernel, pace), fetch_s), rel=1e-9)


def _plain(
    ask: RouteRequest, load: NodeLoad, forecast: Forecast, fetch_s: float
) -> tuple[float, float, float]:
    parts = load.work.adapters
    queued = sum(part.prefill_tokens for part in parts)
    sequences = sum(part.decode_sequences for part in parts) + queued / 1000
    ranks = [part.rank for part in parts]
    before = ForecastBatch(sequences, load.work.context_tokens + queued, len(ranks), sum(ranks), max(ranks))
    if ask.adapter.digest not in load.adapters:
        ranks.append(ask.adapter.rank)
    context = before.context_tokens + ask.prompt_tokens
    after = ForecastBatch(sequences + 1, context, len(ranks), sum(ranks), max(ranks))
    decode_s, step_s = forecast.decode_s(after), forecast.step_s(after)
    read = queued + max(1, ask.prompt_tokens - ask.cached_tokens["n"])
    read_s = read * forecast.model.prefill_token_s + max(1.0, read / 2048) * decode_s
    first_s = fetch_s + max(read_s, forecast.kv_wait_s(after, step_s))
    others_s = sequences * (step_s - forecast.step_s(before))
    return first_s, step_s, first_s + 200 * (2 * step_s + others_s)


def test_predicted_avoids_a_node_that_tells_a_slow_pace() -> None:
    slow = replace(_load(2), pace=Pace(4.0, 4.0, 4.0))
    assert _chosen(RouteRequest(A, 500), {"x": slow, "y": _load(4)}) == {"y"}


def test_a_request_sent_leaves_what_a_node_told_of_its_steps() -> None:
    told = replace(_load(2), kernel=Kernel.EXACT, pace=Pace(2.0, 1.0, 3.0))
    after = told.plus(RouteRequest(A, 100), times=2)
    assert (after.kernel, after.pace) == (Kernel.EXACT, told.pace)
