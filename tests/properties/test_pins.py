"""Pins over any placement: a pinned adapter has its copies, and no one loses more than it must."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.adapter import AdapterRef
from scheduler.cluster.placement.balanced import BalancedPlacement
from scheduler.cluster.placement.base import PlacementPolicy, Problem
from scheduler.cluster.placement.baselines import HashedPlacement, ReplicatedPlacement
from scheduler.cluster.placement.pins import with_pins
from scheduler.cluster.state import Placement
from tests.chance import examples
from tests.properties.test_placement import RANKS, adapters, after, problem
from tests.scheduler.cluster.lossy import FORECAST, MIB, adapter

POLICIES: dict[str, PlacementPolicy] = {
    "balanced": BalancedPlacement(FORECAST),
    "hashed": HashedPlacement(),
    "replicated": ReplicatedPlacement(),
}


def copies(placement: Placement, ref: AdapterRef) -> list[str]:
    return [share.node for share in placement.shares.get(ref, ())]


def used(placement: Placement) -> dict[str, int]:
    found: dict[str, int] = {}
    for ref, shares in placement.shares.items():
        for share in shares:
            found[share.node] = found.get(share.node, 0) + ref.nbytes
    return found


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=examples(30))
@given(adapters, st.integers(1, 5), st.dictionaries(st.integers(0, 39), st.integers(1, 6), max_size=6))
def test_with_room_every_pinned_adapter_has_its_copies_and_nobody_loses_one(
    name: str, rates: list[tuple[int, float]], nodes: int, asked: dict[int, int]
) -> None:
    what = problem(rates, nodes)
    refs = list(what.demand.tokens_per_s)
    pins = {refs[at % len(refs)]: count for at, count in asked.items()}
    placed = POLICIES[name].place(what)
    pinned = with_pins(what, placed, pins, {})
    for ref in refs:
        assert len(copies(pinned, ref)) >= min(pins.get(ref, 1), nodes)
        assert set(copies(placed, ref)) <= set(copies(pinned, ref))
        assert sum(share.part for share in pinned.shares[ref]) == pytest.approx(1.0)
        if ref not in pins:
            assert pinned.shares[ref] == placed.shares[ref]
    drifted = after(what, pinned, [rate for _, rate in reversed(rates)])
    again = with_pins(drifted, POLICIES[name].place(drifted), pins, {})
    assert all(len(copies(again, ref)) >= min(count, nodes) for ref, count in pins.items())
    assert with_pins(drifted, again, pins, {}) is again, "what has its copies is left alone"


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(40))
@given(
    st.lists(st.tuples(st.sampled_from(RANKS), st.floats(1.0, 5000.0)), min_size=1, max_size=24),
    st.integers(1, 4),
    st.integers(130, 500),
    st.dictionaries(st.integers(0, 23), st.integers(1, 2), max_size=2),
)
def test_in_short_memory_pins_come_before_what_is_not_pinned_and_limits_hold(
    rates: list[tuple[int, float]], nodes: int, mib: int, asked: dict[int, int]
) -> None:
    what = problem(rates, nodes, mib * MIB)
    refs = list(what.demand.tokens_per_s)
    pins = {refs[at % len(refs)]: count for at, count in asked.items()}
    placed = POLICIES["balanced"].place(what)
    pinned = with_pins(what, placed, pins, {})
    assert all(nbytes <= mib * MIB for nbytes in used(pinned).values())
    if sum(ref.nbytes for ref in pins) <= mib * MIB:  # all of them fit on any one node
        for ref, count in pins.items():
            assert len(copies(pinned, ref)) >= min(count, nodes)
    for ref in placed.shares.keys() - pinned.shares.keys():
        assert ref not in pins
        assert max(mib * MIB - used(pinned).get(each.node, 0) for each in what.nodes) < max(
            each.nbytes for each in (*pins, ref)
        )


def test_a_copy_goes_where_the_bytes_are_then_to_another_zone_and_never_where_it_could_not_be_had() -> None:
    ref = adapter("a0", 8)
    what = problem([(8, 5.0), (8, 1.0)], 4)  # n0 and n2 are of one zone, n1 and n3 of the other
    home = Placement({ref: HashedPlacement().place(what).shares[ref]})
    (first,) = copies(home, ref)
    zones = {state.node: state.zone for state in what.nodes}
    (second,) = set(copies(with_pins(what, home, {ref: 2}, {}), ref)) - {first}
    assert zones[second] != zones[first]
    beside = next(node for node in zones if node != first and zones[node] == zones[first])
    nodes = tuple(replace(each, held=(ref,)) if each.node == beside else each for each in what.nodes)
    holding = Problem(what.demand, nodes, what.previous)
    assert copies(with_pins(holding, home, {ref: 2}, {}), ref) == [first, beside]
    others = {each.node for each in what.nodes} - {first}
    assert copies(with_pins(what, home, {ref: 4}, {ref: others}), ref) == [first]
