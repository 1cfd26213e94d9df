"""Routing policies: what each promises, on loads small enough to reckon by hand."""

from collections import Counter
from types import MappingProxyType

import numpy as np
import pytest

from scheduler.cluster.cost import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.routing.base import Ask, NodeLoad, NoNodeReachable, RoutingPolicy
from scheduler.cluster.routing.least_loaded import LeastLoadedRouting
from scheduler.cluster.routing.phi import PhiRouting
from scheduler.cluster.routing.predicted import PredictedRouting
from scheduler.cluster.routing.rendezvous import RendezvousRouting
from scheduler.cluster.routing.toppings import ToppingsRouting
from scheduler.cluster.state import RoutingTable, Share
from tests.scheduler.cluster.lossy import adapter

MODEL = CostModel(Kernel.PADDED, 5e-3, 25e-6, 5e-6, 4e-8, 1.7e-6, 9e-9)
A = adapter("a", 8)
TABLE = RoutingTable(1, MappingProxyType({A: (Share("x", 0.75), Share("y", 0.25))}))
POLICIES: list[RoutingPolicy] = [
    PhiRouting(),
    LeastLoadedRouting(),
    RendezvousRouting(),
    ToppingsRouting(MODEL, 100.0, 0.05),
    PredictedRouting(MODEL),
]


def _load(requests: int, rank: int = 8, prompt_tokens: int = 0) -> NodeLoad:
    return NodeLoad(requests, StepLoad((AdapterLoad(rank, prompt_tokens, requests),), requests * 500))


IDLE = {"x": _load(0), "y": _load(0), "z": _load(0)}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_routes_to_a_reachable_node_whatever_the_table_says(policy: RoutingPolicy) -> None:
    rng = np.random.default_rng(1)
    asks = [Ask(ref, 10) for ref in (A, adapter("unknown"))]
    for reachable in (["z"], ["y", "z"], ["x", "y", "z"]):
        loads = {node: _load(3) for node in reachable}
        for ask in asks:
            assert policy.route(ask, TABLE, loads, rng) in reachable
    with pytest.raises(NoNodeReachable, match="'a'"):
        policy.route(Ask(A, 10), TABLE, {}, rng)


@pytest.mark.parametrize("policy", [PhiRouting(), PredictedRouting(MODEL)], ids=["phi", "predicted"])
def test_phi_holds_on_the_average_when_nodes_are_alike(policy: RoutingPolicy) -> None:
    rng = np.random.default_rng(2)
    taken = Counter(policy.route(Ask(A, 10), TABLE, IDLE, rng) for _ in range(4000))
    assert set(taken) == {"x", "y"}
    assert taken["x"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_phi_gives_the_share_of_a_lost_node_to_the_others() -> None:
    rng = np.random.default_rng(3)
    assert {
        PhiRouting().route(Ask(A, 10), TABLE, {"y": _load(9), "z": _load(0)}, rng) for _ in range(20)
    } == {"y"}


def test_least_loaded_takes_the_fewest_requests_among_the_shares() -> None:
    loads = {"x": _load(5), "y": _load(4), "z": _load(0)}
    assert LeastLoadedRouting().route(Ask(A, 10), TABLE, loads, np.random.default_rng(0)) == "y"


def test_rendezvous_moves_only_the_adapters_of_a_lost_node() -> None:
    policy, rng = RendezvousRouting(), np.random.default_rng(0)
    asks = [Ask(adapter(f"a{at}"), 10) for at in range(300)]
    before = [policy.route(ask, TABLE, IDLE, rng) for ask in asks]
    after = [policy.route(ask, TABLE, {"x": _load(0), "z": _load(0)}, rng) for ask in asks]
    assert all(was in (now, "y") for was, now in zip(before, after, strict=True))
    assert min(Counter(before).values()) > 70


def test_toppings_avoids_the_node_where_a_large_rank_slows_everybody() -> None:
    """Equal requests; a rank-128 adapter on small-rank x would pad all of them, on y it changes nothing."""
    big = adapter("big", 128)
    table = RoutingTable(1, MappingProxyType({big: (Share("x", 0.5), Share("y", 0.5))}))
    loads = {"x": _load(10, rank=8), "y": _load(10, rank=128)}
    policy = ToppingsRouting(MODEL, 100.0, 1.0)
    assert policy.route(Ask(big, 10), table, loads, np.random.default_rng(0)) == "y"


def test_toppings_survives_empty_nodes_and_slos_that_all_break() -> None:
    rng = np.random.default_rng(0)
    hopeless = ToppingsRouting(MODEL, 100.0, 0.001)
    assert hopeless.route(Ask(A, 10), TABLE, IDLE, rng) in ("x", "y")
    assert hopeless.route(Ask(A, 10), TABLE, {"x": _load(90), "y": _load(4)}, rng) == "y"
    assert (
        ToppingsRouting(MODEL, 100.0, 0.05).route(Ask(A, 10), TABLE, {"x": _load(3), "y": _load(0)}, rng)
        == "y"
    )


def test_predicted_avoids_a_queue_and_still_sends_some_there() -> None:
    rng = np.random.default_rng(4)
    loads = {"x": _load(2, prompt_tokens=20_000), "y": _load(2)}
    taken = Counter(PredictedRouting(MODEL).route(Ask(A, 500), TABLE, loads, rng) for _ in range(2000))
    assert taken["x"] / 2000 == pytest.approx(0.75**2, abs=0.04), "only when both draws name it"


def test_predicted_prefers_the_node_that_has_the_prefix() -> None:
    rng = np.random.default_rng(5)
    ask = Ask(A, 4000, MappingProxyType({"y": 3900}))
    taken = Counter(PredictedRouting(MODEL).route(ask, TABLE, IDLE, rng) for _ in range(1000))
    assert taken["y"] / 1000 == pytest.approx(1 - 0.75**2, abs=0.05)
