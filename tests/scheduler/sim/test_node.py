"""A simulated node's memory: what is kept, what is cached, what has to wait and what is refused."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from lora.adapter import BASE, AdapterRef
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import Drop, Pull
from scheduler.limits import DEFAULTS
from scheduler.request import Request, SamplingParams
from scheduler.sim.clock import Action, Clock
from scheduler.sim.node import News, Progress, SimNode
from scheduler.sim.spec import NodeSpec
from tests.scheduler.cluster.lossy import MIB, adapter
from tests.scheduler.sim.clusters import node_spec

SMALL, MIDDLE, LARGE = adapter("small", 8), adapter("middle", 16), adapter("large", 64)


class Router:
    """Keeps what it is told of each request."""

    def __init__(self) -> None:
        self.name, self.up = "router", True
        self.told: dict[str, list[Progress]] = {}

    def hear(self, node: str, news: Sequence[News]) -> None:
        for name, progress in news:
            self.told.setdefault(name, []).append(progress)

    def lose(self, node: str) -> None:
        raise AssertionError("nothing breaks here")


class Rig:
    """One node with 64 MiB for adapters; a transfer takes a second."""

    def __init__(self, spec: NodeSpec | None = None) -> None:
        spec = spec or node_spec(memory_bytes=64 * MIB)
        self.clock = Clock()
        self.node = SimNode(
            NodeAgent("n", spec.machine),
            spec,
            self.clock,
            self._transfer,
            lambda node, listener, news: listener.hear(node.name, news),
        )
        self.router = Router()
        self.told = self.router.told
        self._orders = 0

    def _transfer(self, ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
        self.clock.after(1.0, done)

    def ask(self, name: str, ref: AdapterRef, output_tokens: int = 10, prompt_tokens: int = 20) -> None:
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, seed=0)
        self.told[name] = []
        request = Request(name, (len(self.told),) * prompt_tokens, ref, params, (), self.clock.now)
        self.node.submit(request, self.router)
        self.node.check()

    def order(self, kind: type[Pull] | type[Drop], ref: AdapterRef) -> None:
        self._orders += 1
        self.node.obey(
            Pull("n", 1, self._orders, ref, ()) if kind is Pull else Drop("n", 1, self._orders, ref)
        )
        self.node.check()

    def wait(self, seconds: float) -> None:
        self.clock.run(self.clock.now + seconds, self.node.check)


def test_an_adapter_that_is_not_here_is_fetched_and_stays_cached() -> None:
    rig = Rig()
    rig.ask("r", SMALL)
    rig.wait(0.9)
    assert rig.told["r"] == []
    rig.wait(1.0)
    assert rig.told["r"] == [*[Progress.TOKEN] * 10, Progress.DONE]
    assert rig.node.report().cached == (SMALL,)
    assert rig.node.report().held == ()


def test_a_router_that_starts_anew_hears_of_its_own_requests_alone() -> None:
    rig, before, after = Rig(), Router(), Router()
    params = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)
    for router, name, number in ((before, "old", 7), (after, "new", 1)):
        rig.node.submit(Request(name, (1,) * 20, SMALL, params, (), 0.0), router, number)
    rig.wait(3.0)
    assert (set(before.told), set(after.told)) == ({"old"}, {"new"})
    load = rig.node.load()
    assert [rig.node.load_for(router, load).heard for router in (before, after)] == [7, 1]


def test_cached_adapters_give_way_and_the_longest_unused_first() -> None:
    rig = Rig()
    others = [adapter(f"o{at}", 16) for at in range(4)]
    for ref in others:
        rig.ask(ref.name, ref)
        rig.wait(3.0)
    rig.ask("again", others[0])
    rig.wait(3.0)
    rig.order(Pull, SMALL)
    rig.wait(3.0)
    assert rig.node.report().held == (SMALL,)
    assert others[1] not in rig.node.report().cached
    assert others[0] in rig.node.report().cached


def test_what_is_in_use_stays_and_a_pull_waits_for_it() -> None:
    rig = Rig()
    rig.ask("long", MIDDLE, output_tokens=800)
    rig.wait(1.5)
    rig.order(Pull, LARGE)
    rig.wait(1.5)
    assert rig.node.report().loading == (LARGE,)
    assert Progress.DONE not in rig.told["long"]
    rig.wait(10.0)
    assert Progress.DONE in rig.told["long"]
    assert rig.node.report().held == (LARGE,)


def test_the_first_in_line_gets_its_adapter_though_those_behind_it_hold_all_memory() -> None:
    """Four small adapters fill the memory and are asked for again and again; a large one waits for all of it."""
    rig = Rig()
    small = [adapter(f"o{at}", 16) for at in range(4)]
    for ref in small:
        rig.ask(ref.name, ref, output_tokens=100)
    rig.wait(1.5)
    rig.ask("large", LARGE)
    for at in range(40):
        rig.ask(f"{at}", small[at % 4], output_tokens=100)
        rig.wait(0.5)
    rig.wait(60.0)
    assert all(told[-1] is Progress.DONE for told in rig.told.values())


def test_for_a_cold_adapter_only_the_requests_of_one_hot_one_wait_and_its_own_wait_has_an_end() -> None:
    """Four hot adapters fill the memory, and each is asked for every half second, for about two seconds."""
    rig = Rig()
    hot = [adapter(f"o{at}", 16) for at in range(4)]
    held_up: set[str] = set()
    cold_by = 0.0
    for at in range(40):
        names = {f"{ref.name}-{at}": ref for ref in hot}
        for name, ref in names.items():
            rig.ask(name, ref, output_tokens=300)
        if at == 10:
            rig.ask("cold", SMALL, output_tokens=2)
        rig.wait(0.5)
        if at >= 10 and Progress.DONE not in rig.told["cold"]:
            held_up |= {ref.name for name, ref in names.items() if not rig.told[name]}
            cold_by = rig.clock.now
    assert cold_by <= 5.0 + DEFAULTS.adapter_patience_s + 3.0 + 1.0 + 1.0, "patience, what runs, the load"
    assert len(held_up) == 1
    rig.wait(60.0)
    assert all(told[-1] is Progress.DONE for told in rig.told.values())


def test_a_request_whose_adapter_has_no_room_beside_what_is_kept_is_refused_at_once() -> None:
    rig = Rig()
    rig.order(Pull, LARGE)
    rig.ask("r", SMALL)
    assert rig.told["r"] == [Progress.REFUSED]
    assert rig.node.jobs() == []


def test_a_waiting_request_is_refused_when_what_is_kept_takes_its_room_for_good() -> None:
    rig = Rig()
    others = [adapter(f"o{at}", 16) for at in range(4)]
    for ref in others:
        rig.ask(ref.name, ref, output_tokens=2000)
    rig.wait(2.0)
    rig.ask("waits", SMALL)
    assert rig.told["waits"] == []
    rig.order(Pull, LARGE)
    assert rig.told["waits"] == [Progress.REFUSED]
    rig.wait(60.0)
    assert rig.node.report().held == (LARGE,)


def test_a_dropped_adapter_is_held_until_its_requests_have_ended() -> None:
    rig = Rig()
    rig.order(Pull, SMALL)
    rig.wait(2.0)
    rig.ask("r", SMALL, output_tokens=400)
    rig.order(Drop, SMALL)
    assert rig.node.report().held == (SMALL,)
    rig.wait(20.0)
    assert Progress.DONE in rig.told["r"]
    assert rig.node.report().held == ()
    assert rig.node.report().cached == (SMALL,)


def test_an_aborted_request_lets_go_of_its_adapter() -> None:
    rig = Rig()
    rig.order(Pull, SMALL)
    rig.wait(2.0)
    rig.ask("r", SMALL, output_tokens=400)
    rig.order(Drop, SMALL)
    rig.node.abort("r")
    assert rig.node.report().held == ()
    rig.wait(5.0)
    assert Progress.DONE not in rig.told["r"]


def test_a_prompt_that_could_never_run_is_refused() -> None:
    rig = Rig()
    rig.ask("r", SMALL, output_tokens=9000)
    assert rig.told["r"] == [Progress.REFUSED]


def test_adapters_cost_kv_and_give_their_room_back() -> None:
    """A card of 2 GiB, one of them adapters' at most: with those there K/V holds 8,192 tokens, else more."""
    rig = Rig(node_spec(memory_bytes=1024 * MIB, kv_bytes=1024 * MIB))
    held = rig.node.kv_tokens
    large = [adapter(f"o{at}", 256) for at in range(4)]
    for ref in large:
        rig.ask(ref.name, ref, output_tokens=2000)
        rig.wait(2.5)
    assert set(rig.node.store.ready) == {ref.digest for ref in large}
    assert rig.node.kv_tokens == 8192 < held
    rig.wait(60.0)
    for at in range(3):
        rig.ask(f"long-{at}", BASE, output_tokens=100, prompt_tokens=7000)
    most = 0
    for _ in range(100):
        rig.wait(0.1)
        most = max(most, rig.node.kv_tokens)
    assert most >= 14000, "K/V takes what no request uses"
    assert all(told[-1] is Progress.DONE for told in rig.told.values())


def test_more_than_may_wait_are_refused() -> None:
    spec = node_spec(memory_bytes=64 * MIB)
    limits = replace(spec.limits, max_num_seqs=2)
    rig = Rig(replace(spec, limits=limits, max_waiting=3))
    for at in range(7):
        rig.ask(f"{at}", BASE, output_tokens=100)
    assert [name for name, told in rig.told.items() if told == [Progress.REFUSED]] == ["4", "5", "6"]


def test_a_card_that_holds_no_sequence_of_the_longest_is_refused() -> None:
    spec = node_spec(memory_bytes=64 * MIB, kv_bytes=1024 * MIB)
    with pytest.raises(ValueError, match="shorter max_model_len"):
        Rig(replace(spec, memory_bytes=1024 * MIB))


def test_memory_that_is_not_shared_stays_as_it_is_divided() -> None:
    rig = Rig(replace(node_spec(memory_bytes=64 * MIB, kv_bytes=1024 * MIB), unified=False))
    rig.ask("long", BASE, prompt_tokens=8000)
    rig.ask("other", BASE, prompt_tokens=8000)
    rig.ask("small", SMALL)
    rig.wait(30.0)
    assert rig.node.kv_tokens == 8192
    assert all(told[-1] is Progress.DONE for told in rig.told.values())
