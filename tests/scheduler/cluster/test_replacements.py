"""Why the coordinator placed anew: each replacement tells what happened before it, and what moved."""

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.planning import Move, Replacement
from scheduler.cluster.protocol.messages import AdapterPinned
from scheduler.cluster.state import normalised
from tests.scheduler.cluster.lossy import MIB, LossyCluster, adapter

REFS = [adapter(f"a{at}", rank) for at, rank in enumerate([8, 8, 16, 64, 64, 128])]


def _cluster(nodes: int) -> LossyCluster:
    cluster = LossyCluster(2048 * MIB)
    for ref in REFS:
        cluster.add(ref)
    for at in range(nodes):
        cluster.start(f"n{at}")
    cluster.settle(20)
    return cluster


def _ask(cluster: LossyCluster, ref: AdapterRef, tokens: int, seconds: int) -> None:
    for _ in range(seconds):
        homes = [share.node for share in cluster.coordinator.table.shares[ref]]
        cluster.agents[homes[0]].took(ref, tokens)
        cluster.settle(1)


def _since(cluster: LossyCluster, at_s: float) -> list[Replacement]:
    return [each for each in cluster.coordinator.plans.last if each.at_s >= at_s]


def test_a_cluster_that_begins_says_so() -> None:
    first = _cluster(2).coordinator.plans.last[0]
    assert "start" in first.reasons
    assert {node for move in first.moves for node in move.gained} <= {"n0", "n1"}


def test_a_node_that_joins_or_is_lost_is_the_reason_of_the_moves_that_follow() -> None:
    cluster = _cluster(2)
    for ref in REFS:
        _ask(cluster, ref, 3000, 2)
    joined_s = cluster.now
    cluster.start("n9")
    cluster.settle(15)
    assert "node_joined" in _since(cluster, joined_s)[0].reasons
    assert any("n9" in move.gained for each in _since(cluster, joined_s) for move in each.moves)
    lost_s, lost = cluster.now, cluster.coordinator.table.shares[REFS[0]][0].node
    cluster.crash(lost, noticed=True)
    cluster.settle(15)
    (after,) = _since(cluster, lost_s)[:1]
    assert after.reasons == ("node_left",)
    assert any(move.lost == (lost,) and move.gained for move in after.moves)
    assert all(lost not in move.gained for move in after.moves)


def test_a_pin_and_a_crowd_are_told_apart() -> None:
    cluster = _cluster(3)
    pinned_s = cluster.now
    cluster.tell(AdapterPinned(REFS[2], 3))
    cluster.settle(8)
    (pinned,) = _since(cluster, pinned_s)[:1]
    assert "pin" in pinned.reasons
    assert REFS[2] in [move.adapter for move in pinned.moves if move.gained]
    crowd_s = cluster.now
    _ask(cluster, REFS[3], 60_000, 12)
    crowded = _since(cluster, crowd_s)
    assert {reason for each in crowded for reason in each.reasons} == {"demand"}


def test_what_is_remembered_is_bounded() -> None:
    cluster = _cluster(2)
    for at in range(20):
        for one in range(12 if at == 19 else 1):
            cluster.add(adapter(f"b{at} {one}", 8))
        cluster.settle(4)
    plans = cluster.coordinator.plans
    assert plans.count > len(plans.last) == 16
    assert {each.reasons[-1] for each in plans.last} == {"adapter_added"}
    assert (plans.last[-1].adapters, len(plans.last[-1].moves)) == (12, 8)


def test_a_move_names_who_gained_and_who_lost() -> None:
    before = normalised([("n0", 0.5), ("n1", 0.5)])
    assert Move.between(REFS[0], before, normalised([("n1", 1.0), ("n2", 1.0)])) == Move(
        REFS[0], ("n2",), ("n0",)
    )
    assert Move.between(REFS[0], before, normalised([("n0", 0.1), ("n1", 0.9)])) == Move(REFS[0], (), ())
