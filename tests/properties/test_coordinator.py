"""The coordinator under every disorder: what must hold after each event, and that quiet brings agreement."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.adapter import AdapterRef
from scheduler.cluster.protocol.messages import Tick
from tests.chance import examples
from tests.scheduler.cluster.lossy import MIB, LossyCluster, adapter

NODES = ["n0", "n1", "n22", "n33"]
ADAPTERS = [adapter(f"a{at}", rank) for at, rank in enumerate([8, 8, 16, 32, 64, 128, 8, 16])]
ROOMY, TIGHT = 1024 * MIB, 160 * MIB

small = st.integers(0, 1000)
step = st.one_of(
    st.tuples(st.just("report"), st.sampled_from(NODES), st.sampled_from([1.0, 1.1, 3.0])),
    st.tuples(st.just("deliver"), small, st.just(0)),
    st.tuples(st.just("deliver"), small, st.just(0)),
    st.tuples(st.just("double"), small, st.just(0)),
    st.tuples(st.just("lose"), small, st.just(0)),
    st.tuples(st.just("arrive"), small, st.just(0)),
    st.tuples(st.just("free"), small, st.just(0)),
    st.tuples(st.just("pass"), st.sampled_from([0.1, 0.5, 1.0, 2.5, 6.0]), st.just(0)),
    st.tuples(st.just("crash"), st.sampled_from(NODES), st.booleans()),
    st.tuples(st.just("start"), st.sampled_from(NODES), st.just(0)),
    st.tuples(st.just("leave"), st.sampled_from(NODES), st.just(0)),
    st.tuples(st.just("add"), st.sampled_from(ADAPTERS), st.just(0)),
    st.tuples(st.just("delete"), st.sampled_from(ADAPTERS), st.just(0)),
    st.tuples(st.just("fail over"), small, st.just(0)),
    st.tuples(st.just("ask"), st.sampled_from(NODES), st.sampled_from(ADAPTERS)),
)


def _take(cluster: LossyCluster, kind: str, what: object, how: object) -> None:
    match kind, what:
        case "pass", float():
            cluster.now += what
            cluster.tell(Tick())
        case "report", str():
            assert isinstance(how, float)
            cluster.report(what, how)
        case (("deliver" | "double" | "lose"), int()) if cluster.network:
            at = what % len(cluster.network)
            if kind == "lose":
                cluster.network.pop(at)
            else:
                cluster.deliver(at, keep=kind == "double")
        case "arrive", int() if cluster.fetches:
            cluster.arrive(what % len(cluster.fetches))
        case "free", int() if cluster.frees:
            cluster.free(what % len(cluster.frees))
        case "crash", str():
            cluster.crash(what, noticed=bool(how))
        case "start", str() if what not in cluster.agents:
            cluster.start(what)
        case "leave", str():
            cluster.leave(what)
        case "add", AdapterRef():
            cluster.add(what)
        case "delete", AdapterRef():
            cluster.delete(what)
        case "ask", str() if what in cluster.agents and isinstance(how, AdapterRef):
            cluster.agents[what].took(how, 60_000)
        case "fail over", _:
            cluster.fail_over()
        case _:
            pass


def _begin(memory_bytes: int) -> LossyCluster:
    cluster = LossyCluster(memory_bytes)
    for ref in ADAPTERS[:5]:
        cluster.add(ref)
    for node in NODES[:3]:
        cluster.start(node)
    cluster.settle(5)
    return cluster


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(60))
@given(st.lists(step, max_size=80), st.sampled_from([ROOMY, TIGHT]))
def test_disorder_never_breaks_a_promise_and_quiet_brings_agreement(
    steps: list[tuple[str, object, object]], memory_bytes: int
) -> None:
    cluster = _begin(memory_bytes)
    for kind, what, how in steps:
        _take(cluster, kind, what, how)
    if not cluster.agents:
        cluster.start("n0")
    silent = cluster.settle(90)
    assert silent >= 20, f"still sending after {90 - silent} quiet seconds"
    table = cluster.coordinator.table
    cluster.check_routes()
    assert (
        list(table.shares) and all(agent.table == table for agent in cluster.agents.values())
    ) or not cluster.registered
    assert sorted(ref.name for ref in table.shares) == sorted(ref.name for ref in cluster.registered)
    for ref, shares in table.shares.items():
        really = [node for node, agent in cluster.agents.items() if agent.keeps(ref)]
        assert not really or all(share.node in really for share in shares)
        if memory_bytes == ROOMY:
            assert really
    for ref in ADAPTERS:
        if ref not in cluster.registered and not cluster.epoch:
            assert not any(agent.has(ref) for agent in cluster.agents.values())


@settings(deadline=None, max_examples=examples(20))
@given(st.lists(step, max_size=40))
def test_same_events_give_the_same_commands(steps: list[tuple[str, object, object]]) -> None:
    sent_by = []
    for _ in range(2):
        cluster = _begin(TIGHT)
        sent = []
        for kind, what, how in steps:
            _take(cluster, kind, what, how)
            sent.append(list(cluster.network))
        sent_by.append(sent)
    assert sent_by[0] == sent_by[1]
