"""The coordinator, event by event: what it does when nodes and adapters come, go, slow down and get popular."""

import sys
from dataclasses import replace

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.protocol.messages import (
    AdapterAdded,
    AdapterPinned,
    AllowLeave,
    Command,
    Crash,
    Drop,
    Publish,
    Pull,
    Rejoin,
    Report,
    Tick,
)
from scheduler.cluster.state import Shares
from tests.scheduler.cluster.lossy import MIB, LossyCluster, adapter, make_coordinator

REFS = [adapter(f"a{at}", rank) for at, rank in enumerate([8, 8, 8, 16, 64, 128])]


def _cluster(nodes: int = 3, refs: list[AdapterRef] = REFS, memory_bytes: int = 2048 * MIB) -> LossyCluster:
    cluster = LossyCluster(memory_bytes)
    for ref in refs:
        cluster.add(ref)
    for at in range(nodes):
        cluster.start(f"n{at}")
    assert cluster.settle(20) > 5
    return cluster


def _routes(coordinator: Coordinator, ref: AdapterRef) -> Shares:
    return coordinator.table.shares[ref]


def _homes(cluster: LossyCluster, ref: AdapterRef) -> list[str]:
    """The nodes that are to serve it, replicas left out."""
    return [share.node for share in _routes(cluster.coordinator, ref) if share.part > 0.01]


def _ask(cluster: LossyCluster, ref: AdapterRef, tokens: int, seconds: int) -> None:
    """Spread over the nodes that serve it."""
    for _ in range(seconds):
        for node in _homes(cluster, ref):
            cluster.agents[node].took(ref, tokens // len(_homes(cluster, ref)))
        cluster.settle(1)


def test_a_new_cluster_listens_first_and_then_routes_everything_to_who_has_it() -> None:
    cluster = LossyCluster(2048 * MIB)
    for ref in REFS:
        cluster.add(ref)
    cluster.start("n0")
    cluster.settle(2)
    assert cluster.coordinator.table.version == 0
    cluster.settle(20)
    for ref in REFS:
        assert all(cluster.agents[node].keeps(ref) for node in _homes(cluster, ref))


def test_a_node_that_joins_is_used_and_the_adapters_move_add_before_remove() -> None:
    cluster = _cluster(1)
    for ref in REFS:
        _ask(cluster, ref, 3000, 2)
    cluster.start("n9")
    cluster.settle(30)
    assert any("n9" in _homes(cluster, ref) for ref in REFS)


def test_a_new_adapter_is_routed_at_once_and_pulled() -> None:
    cluster = _cluster()
    fresh = adapter("fresh", 16)
    cluster.now += 1
    cluster.registered[fresh] = None
    commands = cluster.coordinator.on_event(AdapterAdded(fresh), cluster.now)
    pulls = [command for command in commands if isinstance(command, Pull)]
    tables = [command.table for command in commands if isinstance(command, Publish)]
    assert len(pulls) == 1
    assert [share.node for share in tables[-1].shares[fresh]] == [pulls[0].node]


def test_a_deleted_adapter_leaves_the_table_and_every_node() -> None:
    cluster = _cluster()
    cluster.now += 1
    cluster.delete(REFS[0])
    assert REFS[0] not in cluster.coordinator.table.shares
    cluster.settle(5)
    assert not any(agent.has(REFS[0]) for agent in cluster.agents.values())


def test_a_crash_reroutes_at_once_and_restores_from_the_registry() -> None:
    cluster = _cluster()
    lost = _homes(cluster, REFS[0])[0]
    cluster.now += 1
    session = cluster.agents[lost].session
    cluster.crash(lost, noticed=False)
    commands = cluster.tell(Crash(lost, session))
    tables = [command.table for command in commands if isinstance(command, Publish)]
    assert all(share.node != lost for shares in tables[-1].shares.values() for share in shares)
    cluster.settle(10)
    assert all(cluster.agents[node].keeps(REFS[0]) for node in _homes(cluster, REFS[0]))


def test_a_silent_node_is_taken_for_dead_and_its_late_words_are_answered_by_rejoin() -> None:
    cluster = _cluster()
    agent = cluster.agents.pop("n0")
    cluster.settle(8)
    assert cluster.coordinator.session("n0") is None
    late = agent.report()
    assert isinstance(late, Report)
    answer = cluster.coordinator.on_event(late, cluster.now)
    assert [type(command) for command in answer] == [Rejoin]
    cluster.agents["n0"] = agent
    cluster.settle(10)
    assert cluster.coordinator.session("n0") == agent.session
    assert agent.session > late.session


def test_a_node_that_asks_to_leave_is_released_when_nothing_depends_on_it() -> None:
    cluster = _cluster()
    cluster.leave("n1")
    cluster.settle(15)
    assert cluster.departed == ["n1"]
    assert all("n1" not in _homes(cluster, ref) for ref in REFS)


def test_the_last_node_is_never_released_while_it_serves() -> None:
    cluster = _cluster(1)
    cluster.leave("n0")
    cluster.settle(15)
    assert cluster.departed == []
    assert all(_homes(cluster, ref) == ["n0"] for ref in REFS)


def test_a_node_goes_in_time_though_the_others_have_no_room_for_what_it_has() -> None:
    cluster = _cluster(2, memory_bytes=sum(ref.nbytes for ref in REFS) // 2 + 32 * MIB)
    cluster.leave("n1")
    cluster.settle(6)
    assert cluster.departed == []
    cluster.settle(15)
    assert cluster.departed == ["n1"]
    assert all(_homes(cluster, ref) == ["n0"] for ref in REFS)


def test_a_flash_crowd_spreads_over_more_nodes() -> None:
    cluster = _cluster()
    hot = REFS[1]
    assert len(_homes(cluster, hot)) == 1
    _ask(cluster, hot, 30_000, 12)
    assert len(_homes(cluster, hot)) >= 2
    assert all(cluster.agents[node].keeps(hot) for node in _homes(cluster, hot))


def test_a_slow_node_loses_load() -> None:
    cluster = _cluster(2, [adapter(f"s{at}", 8) for at in range(20)])
    refs = list(cluster.registered)

    def taken() -> float:
        return sum(
            share.part for ref in refs for share in _routes(cluster.coordinator, ref) if share.node == "n0"
        )

    before = taken()
    for _ in range(30):
        for ref in refs:
            for node in _homes(cluster, ref):
                cluster.agents[node].took(ref, 1500)
        cluster.report("n0", slowdown=4.0)
        sent = cluster.network.pop()[1]
        assert isinstance(sent, Report)
        cluster.now += 1
        cluster.tell(sent)
        for node in ("n1",):
            cluster.report(node)
        cluster.tell(Tick())
        while cluster.network or cluster.fetches or cluster.frees:
            if cluster.network:
                cluster.deliver(0)
            elif cluster.fetches:
                cluster.arrive(0)
            else:
                cluster.free(0)
    assert before > 8
    assert taken() < 0.6 * before


def test_quiet_clusters_are_left_alone_by_small_changes_of_demand() -> None:
    cluster = _cluster()
    before = cluster.coordinator.table
    for at in range(30):
        cluster.agents["n0"].took(REFS[at % 6], 500)
        assert cluster.settle(1) == 1, "no command"
    assert cluster.coordinator.table == before


def test_copies_that_are_not_wanted_go_when_every_node_knows() -> None:
    cluster = _cluster()
    ref = REFS[0]
    home = _homes(cluster, ref)[0]
    other = next(node for node in cluster.agents if node != home)
    agent = cluster.agents[other]
    cluster.now += 1
    stray = agent.report()
    cluster.coordinator.on_event(replace(stray, held=(*stray.held, ref)), cluster.now)
    assert cluster.coordinator.copies(ref)[other] is Copy.HELD
    drops = [each for each in cluster.coordinator.on_event(Tick(), cluster.now) if isinstance(each, Drop)]
    assert [(drop.node, drop.adapter) for drop in drops] == [(other, ref)]


def test_a_full_cluster_routes_what_has_no_room_and_stops_trying() -> None:
    refs = [adapter(f"b{at}", 64) for at in range(6)]
    cluster = _cluster(2, refs, memory_bytes=130 * MIB)
    assert set(cluster.coordinator.table.shares) == set(refs)
    assert sum(agent.keeps(ref) for ref in refs for agent in cluster.agents.values()) == 4


def test_a_new_coordinator_learns_everything_from_reports() -> None:
    cluster = _cluster()
    before = {ref: sorted(share.node for share in _routes(cluster.coordinator, ref)) for ref in REFS}
    version = cluster.coordinator.table.version
    cluster.fail_over()
    cluster.settle(15)
    after = {ref: sorted(share.node for share in _routes(cluster.coordinator, ref)) for ref in REFS}
    assert after == before
    assert cluster.coordinator.table.version > version
    assert not cluster.fetches


def test_a_report_costs_no_more_in_a_larger_cluster() -> None:
    """Work is counted in function calls, which do not depend on the machine."""
    assert _calls_of_a_report(40) <= 1.05 * _calls_of_a_report(4)


def _calls_of_a_report(nodes: int) -> int:
    cluster = LossyCluster(2048 * MIB)
    for at in range(nodes * 5):
        cluster.add(adapter(f"c{at}", 8))
    for at in range(nodes):
        cluster.start(f"n{at:02d}")
    cluster.settle(12)
    agent = cluster.agents["n00"]
    agent.took(next(iter(cluster.registered)), 100)
    report, calls = agent.report(), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    commands: list[Command] = cluster.coordinator.on_event(report, cluster.now)
    sys.setprofile(None)
    assert commands == []
    return calls


def test_releases_are_repeated_until_they_arrive() -> None:
    cluster = _cluster()
    cluster.leave("n2")
    released = 0
    for _ in range(20):
        cluster.now += 1.0
        for node in list(cluster.agents):
            cluster.report(node)
        cluster.tell(Tick())
        while cluster.network:
            is_release = isinstance(cluster.network[0][1], AllowLeave)
            released += is_release
            if is_release and released == 1:
                cluster.network.pop(0)
            else:
                cluster.deliver(0)
        while cluster.fetches:
            cluster.arrive(0)
        while cluster.frees:
            cluster.free(0)
    assert released >= 2
    assert cluster.departed == ["n2"]


def test_coordinators_of_the_same_history_agree() -> None:
    one, other = make_coordinator(), make_coordinator()
    cluster = LossyCluster(2048 * MIB, coordinator=one)
    cluster.start("n0")
    report = cluster.agents["n0"].report()
    events = [report, *(AdapterAdded(ref) for ref in REFS), *(Tick() for _ in range(5))]
    for at, event in enumerate(events):
        assert one.on_event(event, float(at)) == other.on_event(event, float(at))


def test_a_report_that_comes_late_is_not_believed_over_a_newer_one() -> None:
    """The node dropped the adapter after it wrote the first report, which arrives last."""
    cluster = _cluster()
    ref = REFS[0]
    home = _homes(cluster, ref)[0]
    agent = cluster.agents[home]
    cluster.now += 1
    late, newer = agent.report(), agent.report()
    cluster.coordinator.on_event(
        replace(newer, held=tuple(each for each in newer.held if each != ref)), cluster.now
    )
    believed = cluster.coordinator.copies(ref).get(home)
    assert believed is not Copy.HELD
    assert cluster.coordinator.on_event(late, cluster.now) == []
    assert cluster.coordinator.copies(ref).get(home) is believed


def test_what_a_node_cannot_get_is_placed_on_another_and_asked_of_it_again_only_after_a_while() -> None:
    cluster = _cluster(2)
    ref = adapter("fresh", 16)
    cluster.add(ref)
    pulled = [(receiver, each) for receiver, each in cluster.network if isinstance(each, Pull)]
    (unable,) = [receiver for receiver, each in pulled if each.adapter == ref]
    (other,) = set(cluster.agents) - {unable}

    def pulls_of_the_unable(rounds: int) -> int:
        seen = 0
        for _ in range(rounds):
            for node in list(cluster.agents):
                cluster.report(node)
            cluster.now += 1.0
            cluster.tell(Tick())
            while cluster.network or cluster.fetches or cluster.frees:
                if cluster.network:
                    cluster.deliver(0)
                elif cluster.fetches and cluster.fetches[0] == (unable, ref):
                    seen += 1
                    cluster.agents[unable].failed(cluster.fetches.pop(0)[1])
                elif cluster.fetches:
                    cluster.arrive(0)
                else:
                    cluster.free(0)
        return seen

    assert pulls_of_the_unable(12) == 1
    assert cluster.agents[other].keeps(ref)
    assert _homes(cluster, ref) == [other]
    cluster.crash(other, noticed=True)
    assert pulls_of_the_unable(10) == 0
    assert _homes(cluster, ref) == [unable], "a request may still find a way"
    assert 1 <= pulls_of_the_unable(40) <= 2


def test_a_pinned_adapter_gets_its_copies_keeps_them_and_loses_them_when_it_is_unpinned() -> None:
    cluster = _cluster(3)
    ref = REFS[2]

    def copies() -> int:
        return sum(agent.keeps(ref) for agent in cluster.agents.values())

    assert copies() == 1
    cluster.tell(AdapterPinned(ref, 2))
    cluster.settle(8)
    assert copies() == 2
    for other in REFS:
        _ask(cluster, other, 20_000, 3)
    assert copies() >= 2
    cluster.crash(_homes(cluster, ref)[0], noticed=True)
    cluster.settle(10)
    assert copies() == 2
    cluster.start("n7")
    cluster.tell(AdapterPinned(ref, 9))
    cluster.settle(20)
    assert copies() == 3, "one on each node"
    cluster.tell(AdapterPinned(ref, 0))
    for other in REFS:
        _ask(cluster, other, 20_000, 4)
    assert copies() < 3
    assert cluster.coordinator.plans.count == len(cluster.coordinator.plans.last) > 0


def test_a_pinned_adapter_finds_room_among_what_no_plan_has_room_for() -> None:
    refs = [adapter(f"b{at}", 64) for at in range(6)]
    cluster = _cluster(2, refs, memory_bytes=146 * MIB)
    absent = next(ref for ref in refs if not any(agent.keeps(ref) for agent in cluster.agents.values()))
    cluster.excused.update(dict.fromkeys(refs))
    cluster.check_drop = lambda drop: None  # type: ignore[method-assign]  # last copies go, to what is pinned
    cluster.tell(AdapterPinned(absent, 2))
    cluster.settle(20)
    assert all(agent.keeps(absent) for agent in cluster.agents.values())
    assert sum(agent.keeps(ref) for ref in refs for agent in cluster.agents.values()) == 4
    cluster.tell(AdapterPinned(absent, 0))
    cluster.settle(20)
    assert set(cluster.coordinator.table.shares) == set(refs)
