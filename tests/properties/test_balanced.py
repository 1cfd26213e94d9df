"""Our placement on random problems: never a slower step than any other policy's, within memory, moving little."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Lengths
from scheduler.cluster.placement.balanced import BalancedOptions, BalancedPlacement
from scheduler.cluster.placement.base import PlacementPolicy, Problem, fetched_bytes
from scheduler.cluster.placement.baselines import ContiguousPlacement, FirstFitPlacement, RandomPlacement
from scheduler.cluster.placement.loraserve import LoraservePlacement
from scheduler.cluster.placement.partition import partition
from scheduler.cluster.placement.rank_order import rank_order, step_seconds
from scheduler.cluster.placement.replicas import REPLICA_PART
from scheduler.cluster.state import EMPTY_PLACEMENT, Demand, NodeState, Placement
from scheduler.sim.ablations.placements import RankCeilingPlacement
from tests.chance import examples
from tests.properties.test_placement import RANKS, after, problem
from tests.scheduler.cluster.lossy import MIB, MODEL, POINTS, adapter, held_by

KERNELS = list(Kernel)
LONE = BalancedOptions(covered=0.0)
busy = st.lists(st.tuples(st.sampled_from(RANKS), st.floats(1.0, 5000.0)), min_size=1, max_size=40)
any_demand = st.lists(
    st.tuples(st.sampled_from(RANKS), st.floats(1.0, 5000.0) | st.just(0.0)), min_size=1, max_size=40
)


def forecast(kernel: Kernel) -> Forecast:
    return Forecast(MODEL.under(kernel, 128), Lengths(1024, 256))


def ours(kernel: Kernel, options: BalancedOptions | None = None) -> BalancedPlacement:
    return BalancedPlacement(forecast(kernel), options)


def slowest(kernel: Kernel, what: Problem, placement: Placement) -> float:
    return max(step_seconds(forecast(kernel), what, placement).values())


def drifted(rates: list[tuple[int, float]], seed: int) -> list[float]:
    factors = np.exp(np.random.default_rng(seed).normal(0, 0.7, len(rates))).tolist()
    return [rate * factor for (_, rate), factor in zip(rates, factors, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=examples(15))
@given(busy, st.integers(1, 8), st.integers(0, 2**31))
@example([(8, 1.0), (16, 27.0)], 8, 0)
def test_no_policy_makes_the_slowest_step_faster_at_first_or_after_drift(
    kernel: Kernel, rates: list[tuple[int, float]], nodes: int, seed: int
) -> None:
    others: list[PlacementPolicy] = [
        LoraservePlacement(),
        RankCeilingPlacement(kernel),
        ContiguousPlacement(),
        FirstFitPlacement(),
        RandomPlacement(np.random.default_rng(seed)),
    ]
    first, deciding = problem(rates, nodes), ours(kernel, BalancedOptions(slack=0.0))
    mine = deciding.place(first)
    later = drifted(rates, seed)
    mine_later = slowest(kernel, after(first, mine, later), deciding.place(after(first, mine, later)))
    for other in others:
        theirs = other.place(first)
        assert slowest(kernel, first, mine) <= slowest(kernel, first, theirs) * 1.03
        what = after(first, theirs, later)
        assert mine_later <= slowest(kernel, what, other.place(what)) * 1.03


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=examples(15))
@given(any_demand, st.integers(1, 6), st.integers(1, 6))
def test_everything_is_placed_once_also_after_drift_and_lost_nodes(
    kernel: Kernel, rates: list[tuple[int, float]], nodes: int, nodes_after: int
) -> None:
    first = problem(rates, nodes)
    placed = ours(kernel).place(first)
    what = after(problem(rates, nodes_after), placed, [rate for _, rate in reversed(rates)])
    again = ours(kernel).place(what)
    for seen, placement in ((first, placed), (what, again)):
        known = {state.node for state in seen.nodes}
        assert placement.shares.keys() == seen.demand.tokens_per_s.keys()
        for shares in placement.shares.values():
            assert sum(share.part for share in shares) == pytest.approx(1.0)
            assert {share.node for share in shares} <= known
            assert len({share.node for share in shares}) == len(shares)
    assert ours(kernel).place(what) == again, "the same problem, the same placement"


@settings(deadline=None, max_examples=examples(20))
@given(any_demand, st.integers(1, 6), st.integers(64, 400), st.sampled_from(KERNELS))
def test_memory_holds_and_only_what_has_no_room_is_left_out(
    rates: list[tuple[int, float]], nodes: int, mib: int, kernel: Kernel
) -> None:
    what = problem(rates, nodes, mib * MIB)
    placed = ours(kernel).place(what)
    free = {state.node: mib * MIB for state in what.nodes}
    for ref, shares in placed.shares.items():
        for share in shares:
            free[share.node] -= ref.nbytes
    assert min(free.values()) >= 0
    missing = [ref for ref in what.demand.tokens_per_s if ref not in placed.shares]
    assert all(max(free.values()) < ref.nbytes for ref in missing)


@settings(deadline=None, max_examples=examples(15))
@given(busy, st.integers(1, 6), st.sampled_from(KERNELS), st.floats(0.99, 1.01))
def test_what_is_good_is_left_alone(
    rates: list[tuple[int, float]], nodes: int, kernel: Kernel, change: float
) -> None:
    first = problem(rates, nodes)
    what = after(first, ours(kernel).place(first), [rate * change for _, rate in rates])
    assert fetched_bytes(what, ours(kernel).place(what)) == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_replicas_fewer_bytes_move_after_drift_than_the_paper_moves(kernel: Kernel) -> None:
    moved = {"ours": 0, "paper": 0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rates = [(int(rng.choice(RANKS)), float(rng.pareto(1.2) * 200 + 1)) for _ in range(60)]
        for name, policy in (("ours", ours(kernel, LONE)), ("paper", LoraservePlacement())):
            first = problem(rates, 6)
            what = after(first, policy.place(first), drifted(rates, seed))
            moved[name] += fetched_bytes(what, policy.place(what))
    assert moved["ours"] < moved["paper"]


def test_ranks_keep_apart_where_kernels_pad_and_every_step_takes_as_long() -> None:
    what = problem([(8, 300.0)] * 40 + [(128, 150.0)] * 20, 4)
    placed = ours(Kernel.PADDED, LONE).place(what)
    mixed = [n.node for n in what.nodes if len({ref.rank for ref in held_by(placed, n.node)}) > 1]
    seconds = step_seconds(forecast(Kernel.PADDED), what, placed).values()
    assert len(mixed) <= 1, "one cut goes between the ranks"
    assert max(seconds) <= 1.1 * min(seconds)


def test_most_of_demand_has_a_replica_in_another_zone_and_the_plan_is_without_it() -> None:
    what = problem([(8, 300.0)] * 12 + [(128, 150.0)] * 12, 6)
    zones = {state.node: state.zone for state in what.nodes}
    placed = ours(Kernel.PADDED, BalancedOptions(covered=1.0)).place(what)
    for shares in placed.shares.values():
        assert len({zones[share.node] for share in shares}) == 2
        assert sum(share.part for share in shares if share.part > 2 * REPLICA_PART) > 0.99
    lone = ours(Kernel.PADDED, LONE).place(what)
    assert slowest(Kernel.PADDED, what, placed) <= 1.05 * slowest(Kernel.PADDED, what, lone)


def test_a_slow_node_is_given_less() -> None:
    what = problem([(8, 500.0)] * 60, 3)
    slow = NodeState("n2", 2**50, POINTS, slowdown=3.0)
    placed = ours(Kernel.EXACT, LONE).place(replace(what, nodes=(*what.nodes[:2], slow)))
    taken: dict[str, float] = {state.node: 0.0 for state in what.nodes}
    for shares in placed.shares.values():
        for share in shares:
            taken[share.node] += share.part
    assert taken["n2"] < 0.4 * taken["n0"]


def test_an_adapter_beyond_one_node_is_split_and_those_beyond_all_are_still_placed() -> None:
    what = problem([(8, 60_000.0), (16, 100.0)], 4)
    shares = ours(Kernel.PADDED, LONE).place(what).shares[adapter("a0", 8)]
    assert len(shares) >= 3
    flooded = problem([(8, 1e7), (128, 1e7)], 2)
    assert len(ours(Kernel.PADDED).place(flooded).shares) == 2


def test_no_adapters_no_shares() -> None:
    nothing = Problem(Demand(MappingProxyType({})), problem([(8, 1.0)], 2).nodes, EMPTY_PLACEMENT)
    assert not ours(Kernel.EXACT).place(nothing).shares


def test_tight_memory_levels_steps_with_small_ranks_beside_large_ones() -> None:
    """A quarter of the requests, four fifths of the bytes: three nodes of four, which take small ones too, for else
    the fourth would answer most requests."""
    what = problem([(8, 3000.0)] * 60 + [(128, 3000.0)] * 20, 4, 1100 * MIB)
    placed = ours(Kernel.PADDED, LONE).place(what)
    assert len(placed.shares) == 80
    large = [n.node for n in what.nodes if any(ref.rank == 128 for ref in held_by(placed, n.node))]
    assert len(large) <= 3
    ordered = rank_order(what, forecast(Kernel.PADDED)).partition_problem
    apart = partition(replace(ordered, descends=False), forecast(Kernel.PADDED))
    assert apart is not None
    assert slowest(Kernel.PADDED, what, placed) < 0.9 * apart.slowest_s
