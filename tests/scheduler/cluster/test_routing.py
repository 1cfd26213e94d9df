"""Routing policies: what each promises, on loads small enough to reckon by hand."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from scheduler.cluster.cost import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.forecast import Forecast
from scheduler.cluster.profile import Lengths
from scheduler.cluster.routing.base import Ask, NodeLoad, NoNodeReachable, Outlook, RoutingPolicy
from scheduler.cluster.routing.least_loaded import LeastLoadedRouting
from scheduler.cluster.routing.phi import PhiRouting
from scheduler.cluster.routing.predicted import PredictedRouting
from scheduler.cluster.routing.rendezvous import RendezvousRouting
from scheduler.cluster.routing.toppings import ToppingsRouting
from scheduler.cluster.state import RoutingTable, Share
from tests.scheduler.cluster.lossy import adapter

MODEL = CostModel(Kernel.PADDED, 5e-3, 25e-6, 5e-6, 4e-8, 1.7e-6, 9e-9)
FORECAST = Forecast(MODEL, Lengths(1000, 200))
A = adapter("a", 8)
TABLE = RoutingTable(1, MappingProxyType({A: (Share("x", 0.75), Share("y", 0.25))}))
POLICIES: list[RoutingPolicy] = [
    PhiRouting(),
    LeastLoadedRouting(),
    RendezvousRouting(),
    ToppingsRouting(MODEL, 100.0, 0.05),
    PredictedRouting(FORECAST),
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


def test_phi_holds_on_the_average() -> None:
    rng = np.random.default_rng(2)
    taken = Counter(PhiRouting().route(Ask(A, 10), TABLE, IDLE, rng) for _ in range(4000))
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


def _chosen(ask: Ask, loads: Mapping[str, NodeLoad], kernel: Kernel = Kernel.PADDED) -> set[str]:
    table = RoutingTable(1, MappingProxyType({ask.adapter: (Share("x", 0.5), Share("y", 0.5))}))
    policy = PredictedRouting(Forecast(replace(MODEL, kernel=kernel), Lengths(1000, 200)))
    return {policy.route(ask, table, loads, np.random.default_rng(seed)) for seed in range(40)}


def test_predicted_avoids_a_queue_and_draws_between_nodes_alike() -> None:
    assert _chosen(Ask(A, 500), {"x": _load(2, prompt_tokens=20_000), "y": _load(2)}) == {"y"}
    assert _chosen(Ask(A, 500), {"x": _load(2), "y": _load(2), "z": _load(0)}) == {"x", "y"}


def test_predicted_spills_when_the_first_token_would_be_late_everywhere_in_the_plan() -> None:
    loads = {"x": _load(2, prompt_tokens=19_000), "y": _load(2, prompt_tokens=9_000), "z": _load(0)}
    assert _chosen(Ask(A, 500), loads) == {"y"}
    loads = {node: _load(2, prompt_tokens=19_000) for node in ("x", "y")} | {"z": _load(0)}
    assert _chosen(Ask(A, 500), loads) == {"z"}
    assert _chosen(
        Ask(A, 500), {"x": _load(2, prompt_tokens=40_000), "z": _load(2, prompt_tokens=60_000)}
    ) == {"x"}


def test_predicted_does_not_spill_to_a_node_whose_memory_is_taken() -> None:
    late = {node: _load(2, prompt_tokens=19_000) for node in ("x", "y")}
    assert _chosen(Ask(A, 500), late | {"z": replace(_load(0), room_bytes=A.nbytes + 1.0)}) == {"z"}
    assert "z" not in _chosen(Ask(A, 500), late | {"z": replace(_load(0), room_bytes=A.nbytes - 1.0)})
    waited_for = replace(_load(0), adapters=frozenset([A.digest]), room_bytes=0.0)
    assert "z" not in _chosen(Ask(A, 500), late | {"z": waited_for})


def test_predicted_keeps_a_large_rank_from_small_ones_where_kernels_pad() -> None:
    """Y has more to do, but x's twenty sequences would all be padded to 128."""
    small = NodeLoad(20, StepLoad(tuple(AdapterLoad(8, 0, 1) for _ in range(20)), 10_000))
    large = NodeLoad(24, StepLoad(tuple(AdapterLoad(128, 0, 1) for _ in range(24)), 12_000))
    ask = Ask(adapter("big", 128), 500)
    assert _chosen(ask, {"x": small, "y": large}) == {"y"}
    assert _chosen(ask, {"x": small, "y": large}, Kernel.EXACT) == {"x"}


def test_predicted_gathers_requests_of_one_adapter_where_that_saves_reading_it_again() -> None:
    parts = tuple(AdapterLoad(64, 0, 4) for _ in range(4))
    here = NodeLoad(16, StepLoad(parts, 8_000), frozenset([adapter("big", 64).digest]))
    other = NodeLoad(16, StepLoad(parts, 8_000))
    assert _chosen(Ask(adapter("big", 64), 500), {"x": here, "y": other}) == {"x"}


def test_predicted_prefers_the_node_that_has_the_prefix() -> None:
    ask = Ask(A, 4000, MappingProxyType({"y": 3900}))
    assert _chosen(ask, {"x": _load(3), "y": _load(3)}) == {"y"}


def test_an_outlook_adds_what_was_sent_since_nodes_spoke_for_every_front_door() -> None:
    outlook, said = Outlook(), {"x": _load(2), "y": _load(2)}
    outlook.hear(said)
    outlook.sent("x", Ask(A, 500))
    outlook.sent("x", Ask(A, 300))
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
