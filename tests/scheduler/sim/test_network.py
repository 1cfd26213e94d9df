"""The simulator's parts: time, network, links, figures."""

from collections import Counter

import numpy as np
import pytest

from scheduler.sim.clock import Clock
from scheduler.sim.network import CopyLinks, CopySpeeds, Network, NetworkFaults, NetworkTimes


def test_time_goes_by_due_time_then_by_order_of_asking() -> None:
    clock, seen = Clock(), []
    for name, due_s in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("late", 9.0)):
        clock.at(due_s, lambda name=name: seen.append((clock.now, name)))
    clock.run(5.0)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    assert clock.now == 5.0


def _posted(faults: NetworkFaults, count: int = 2000) -> list[int]:
    clock, got = Clock(), []
    network = Network(clock, NetworkTimes(), faults, np.random.default_rng(0))
    for at in range(count):
        clock.at(at * 0.01, lambda at=at: network.post("a", "b", lambda: got.append(at)))
    clock.run(1000.0)
    return got


def test_a_good_network_delivers_all_in_order() -> None:
    assert _posted(NetworkFaults()) == list(range(2000))


def test_a_bad_network_loses_doubles_and_reorders_as_often_as_told() -> None:
    assert len(_posted(NetworkFaults(loss=0.3))) / 2000 == pytest.approx(0.7, abs=0.04)
    doubled = Counter(_posted(NetworkFaults(double=0.2)))
    assert sum(count == 2 for count in doubled.values()) / 2000 == pytest.approx(0.2, abs=0.04)
    late = _posted(NetworkFaults(late=0.5))
    assert sorted(late) == list(range(2000))
    assert late != sorted(late)


def test_a_partition_stops_posts_and_breaks_calls() -> None:
    clock, seen = Clock(), []
    network = Network(
        clock, NetworkTimes(latency_s=0.1, detect_s=1.0), NetworkFaults(), np.random.default_rng(0)
    )
    network.cut_off = ("a", "c")

    def call(receiver: str, alive: bool = True) -> None:
        network.call(
            ("a", receiver),
            lambda: alive,
            lambda: seen.append((clock.now, receiver, "there")),
            lambda: seen.append((clock.now, receiver, "broken")),
        )

    network.post("a", "b", lambda: seen.append((clock.now, "b", "posted")))
    call("b")
    call("c")
    call("c", alive=False)
    clock.run(10.0)
    assert seen == [(0.1, "c", "there"), (1.1, "b", "broken"), (1.1, "c", "broken")]


def test_transfers_share_the_ends_of_links() -> None:
    """1,000 bytes at 100/s between peers: two from one source follow each other, another pair runs beside."""
    clock, ended = Clock(), {}
    links = CopyLinks(clock, CopySpeeds(peer_bytes_per_s=100.0, registry_bytes_per_s=10.0, latency_s=1.0))
    for name, source, target in (
        ("one", "a", "b"),
        ("two", "a", "c"),
        ("beside", "d", "e"),
        ("origin", None, "f"),
    ):
        links.transfer(source, target, 1000, lambda name=name: ended.update({name: clock.now}))
    clock.run(1000.0)
    assert ended == {"one": 11.0, "beside": 11.0, "two": 21.0, "origin": 101.0}
    assert links.moved_bytes == 4000


def test_a_recall_from_the_hosts_memory_waits_for_no_transfer_but_for_the_one_before_it() -> None:
    clock, ended = Clock(), {}
    links = CopyLinks(clock, CopySpeeds(peer_bytes_per_s=100.0, host_bytes_per_s=50.0, latency_s=1.0))
    links.transfer("a", "b", 1000, lambda: ended.update({"in": clock.now}))
    for name in ("one", "two"):
        links.recall("b", 1000, lambda name=name: ended.update({name: clock.now}))
    clock.run(1000.0)
    assert ended == {"in": 11.0, "one": 21.0, "two": 41.0}
    assert links.moved_bytes == 1000
