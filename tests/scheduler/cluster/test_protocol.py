"""Commands arrive once and in order, and both ends of the protocol keep their books."""

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.node_view import Copy, NodeView
from scheduler.cluster.protocol.agent import Depart, Fetch, Free, NodeAgent
from scheduler.cluster.protocol.delivery import Inbox, Outbox
from scheduler.cluster.protocol.messages import (
    AllowLeave,
    Drop,
    NodeHardware,
    Numbered,
    Publish,
    Pull,
    Rejoin,
    Report,
)
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable
from tests.scheduler.cluster.lossy import MIB, POINTS, adapter

A, B = adapter("a"), adapter("b")
MACHINE = NodeHardware(64 * MIB, POINTS)


def _pull(number: int, ref: AdapterRef = A, session: int = 1) -> Pull:
    return Pull("n", session, number, ref, ())


def test_a_network_that_loses_doubles_and_reorders_delivers_every_command_once_in_order() -> None:
    rng = np.random.default_rng(0)
    outbox, inbox, now = Outbox(), Inbox(1), 0.0
    network: list[Numbered] = []
    obeyed: list[AdapterRef] = []
    refs = [adapter(f"a{at}") for at in range(50)]
    for ref in refs:
        network.append(outbox.send(_pull(0, ref), now))
    for _ in range(2000):
        now += 0.1
        network += outbox.overdue(now, retry_s=1.0)
        if network:
            at = int(rng.integers(len(network)))
            message = network.pop(at) if rng.random() < 0.8 else network[at]
            if rng.random() < 0.5:
                obeyed += [due.adapter for due in inbox.receive(message) if isinstance(due, Pull)]
        if rng.random() < 0.3:
            outbox.applied(inbox.applied)
    assert obeyed == refs
    assert not len(outbox)


def test_commands_of_another_session_are_not_obeyed() -> None:
    assert Inbox(2).receive(_pull(1, session=1)) == []


def test_an_agent_fetches_keeps_drains_and_frees() -> None:
    agent = NodeAgent("n", MACHINE)
    assert agent.receive(Pull("n", 1, 1, A, ("m",))) == [Fetch(A, ("m",))]
    assert agent.report().loading == (A,)
    agent.arrived(A)
    assert agent.report().held == (A,)
    assert agent.receive(Drop("n", 1, 2, A)) == [Free(A)]
    assert agent.has(A)
    assert not agent.keeps(A)
    assert agent.receive(_pull(3)) == [], "what drains need not be fetched"
    assert agent.keeps(A)
    assert agent.receive(Drop("n", 1, 4, A)) == [Free(A)]
    agent.freed(A)
    assert agent.report().held == ()
    assert agent.receive(AllowLeave("n", 1, 5)) == [Depart()]


def test_a_load_that_was_dropped_or_failed_leaves_nothing_behind() -> None:
    agent = NodeAgent("n", MACHINE)
    agent.receive(_pull(1))
    agent.receive(Drop("n", 1, 2, A))
    agent.arrived(A)
    assert not agent.has(A)
    agent.receive(_pull(3))
    agent.failed(A)
    assert agent.used_bytes == 0
    assert agent.report().applied == 3


def test_an_agent_keeps_the_highest_table() -> None:
    agent = NodeAgent("n", MACHINE)
    for version in (3, 5, 4):
        agent.receive(Publish(("n",), RoutingTable(version, EMPTY_TABLE.shares)))
    assert agent.report().table_version == 5


def test_a_rejoin_begins_a_session_that_keeps_what_is_here_and_is_of_no_account_when_late() -> None:
    agent = NodeAgent("n", MACHINE)
    agent.receive(_pull(1))
    agent.arrived(A)
    agent.receive(Drop("n", 1, 2, A))
    agent.report()
    agent.receive(Rejoin("n", 1, 8))
    agent.receive(Rejoin("n", 1, 9))
    report = agent.report()
    assert (report.session, report.number, report.applied, report.held) == (8, 1, 0, (A,))
    assert agent.keeps(A)


def test_totals_are_cumulative_and_sent_when_they_change() -> None:
    agent = NodeAgent("n", MACHINE)
    agent.took(A, 5)
    assert agent.report().taken == ((A, 5),)
    agent.took(B, 1)
    assert agent.report().taken == ((B, 1),)
    agent.took(A, 2)
    assert agent.report().taken == ((A, 7),)


def _report(
    number: int,
    applied: int = 0,
    held: tuple[AdapterRef, ...] = (),
    loading: tuple[AdapterRef, ...] = (),
    taken: tuple[tuple[AdapterRef, int], ...] = (),
) -> Report:
    return Report("n", 1, number, MACHINE, applied, held=held, loading=loading, taken=taken)


def test_a_report_is_believed_only_about_commands_it_can_know() -> None:
    member = NodeView(_report(1), 0.0)
    member.absorb(_report(1), 0.0)
    member.order(_pull(0), 0.0)
    assert member.absorb(_report(2, applied=0), 1.0) == [], "it left before the pull came"
    assert member.copies == {A: Copy.PULLING}
    assert member.absorb(_report(3, applied=1, loading=(A,)), 2.0) == []
    assert member.absorb(_report(4, applied=1, held=(A,)), 3.0) == [A]
    member.order(Drop("n", 1, 0, A), 3.0)
    assert member.absorb(_report(5, applied=1, held=(A,)), 4.0) == []
    assert member.absorb(_report(6, applied=2, held=(A,)), 5.0) == [], "it drains"
    assert member.used_bytes == A.nbytes
    assert member.absorb(_report(7, applied=2), 6.0) == [A]
    assert (member.copies, member.used_bytes) == ({}, 0)


def test_a_pull_that_failed_is_seen_to_have() -> None:
    member = NodeView(_report(1), 0.0)
    member.order(_pull(0), 0.0)
    assert member.absorb(_report(2, applied=1), 1.0) == [A]
    assert member.copies == {}


def test_old_reports_are_no_news() -> None:
    member = NodeView(_report(1), 0.0)
    member.absorb(_report(4), 0.0)
    assert not member.is_news(_report(3))
    assert not member.is_news(_report(4))
    assert member.is_news(_report(5))


def test_tokens_count_once_however_reports_repeat_totals() -> None:
    member = NodeView(_report(1), 0.0)
    assert member.newly_taken(_report(1, taken=((A, 10), (B, 3)))) == [(A, 10), (B, 3)]
    assert member.newly_taken(_report(2, taken=((A, 10), (B, 5)))) == [(B, 2)]
