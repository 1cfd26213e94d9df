"""A simulated store's pages: what fits in bytes must fit in neighbours too, and what is kept comes again."""

from collections.abc import Sequence
from types import MappingProxyType

from lora.adapter import BASE, AdapterRef
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import Drop, NodeHardware, Publish, Pull
from scheduler.cluster.state import OperatingPoints, RoutingTable, Share
from scheduler.sim.clock import Action
from scheduler.sim.memory.store import AdapterMemory, SimStore, StoreSpec
from tests.scheduler.cluster.lossy import MIB, adapter

NUM_PAGES = 32  # of 1 MiB


class Rig:
    """A store, its agent, and the transfers that the test ends."""

    def __init__(self, host_bytes: int = 0) -> None:
        machine = NodeHardware(NUM_PAGES * MIB, OperatingPoints((8,), (1.0,)))
        self.agent = NodeAgent("n", machine)
        spec, memory = StoreSpec(page_bytes=MIB), AdapterMemory(machine.memory_bytes, NUM_PAGES, host_bytes)
        self.store = SimStore(self.agent, memory, spec, self._transfer, lambda: None)
        self.transfers: list[tuple[AdapterRef, Sequence[str], Action]] = []
        self.ended: list[tuple[AdapterRef, Sequence[str]]] = []
        self._orders = 0

    def _transfer(self, ref: AdapterRef, sources: Sequence[str], done: Action) -> None:
        self.transfers.append((ref, sources, done))

    def end_transfers(self) -> list[tuple[AdapterRef, Sequence[str]]]:
        ended: list[tuple[AdapterRef, Sequence[str]]] = []
        while self.transfers:
            ref, sources, done = self.transfers.pop(0)
            done()
            self.store.check()
            ended.append((ref, sources))
        self.ended += ended
        return ended

    def bring(self, ref: AdapterRef) -> None:
        """One request for it, which has ended."""
        self.want(ref)
        self.store.release(ref)

    def want(self, ref: AdapterRef) -> None:
        """One request for it, which waits."""
        assert self.store.retain(ref)
        self.step(ref)

    def step(self, ref: AdapterRef) -> None:
        """Ask for it until nothing more comes of it, in steps that run nothing."""
        for _ in range(4):
            self.store.begin_step()
            self.store.prefetch((ref,))
            self.end_transfers()

    def keep(self, ref: AdapterRef) -> None:
        self._orders += 1
        self.agent.receive(Pull("n", 1, self._orders, ref, ("elsewhere",)))
        self.store.pull(ref, ("elsewhere",))
        self.end_transfers()

    def drop(self, ref: AdapterRef) -> None:
        self._orders += 1
        self.agent.receive(Drop("n", 1, self._orders, ref))
        self.store.drop(ref)


def test_free_pages_that_are_not_neighbours_do_not_suffice() -> None:
    """Four of 8 MiB fill 32; two that are apart go cold: 16 MiB are to be had, and no 16 in a row."""
    rig = Rig()
    parts = [adapter(f"a{at}", 8) for at in range(4)]
    for ref in parts:
        rig.want(ref)
    for at in (0, 2):
        rig.store.release(parts[at])
    running = (parts[1], parts[3])
    rig.store.begin_step()
    rig.store.acquire(running)
    large = adapter("large", 16)
    assert rig.store.retain(large)
    rig.store.prefetch((large,))
    assert rig.transfers == []
    assert rig.store.evictions == 0, "nothing goes in vain"
    rig.store.end_step(running)
    rig.store.release(parts[1])
    assert [ref for ref, _, _ in rig.transfers] == [large]
    assert rig.store.evictions == 2


def test_the_first_in_line_displaces_what_is_kept_and_it_comes_again() -> None:
    """16 MiB are kept in the middle: neither side of it has 16 free, but both together have."""
    rig = Rig()
    left, kept = adapter("left", 8), adapter("kept", 16)
    rig.bring(left)
    rig.keep(kept)
    large = adapter("large", 16)
    table = RoutingTable(1, MappingProxyType({kept: (Share("n", 0.5), Share("other", 0.5))}))
    rig.agent.receive(Publish(("n",), table))
    assert rig.store.retain(large)
    rig.store.begin_step()
    rig.store.prefetch((large,))
    assert rig.transfers == []
    rig.store.begin_step()  # the kept one has had its chance
    assert [ref for ref, _, _ in rig.transfers] == [large]
    report = rig.agent.report()
    assert (report.held, report.loading) == ((), (kept,))
    rig.end_transfers()
    rig.store.begin_step()
    assert rig.transfers == [], "a pull displaces nothing in use"
    rig.store.release(large)
    rig.store.begin_step()
    assert rig.end_transfers() == [(kept, ("other",))]
    assert rig.agent.report().held == (kept,)


def test_a_pull_displaces_nothing_that_is_kept_or_in_use() -> None:
    rig = Rig()
    used, kept = adapter("used", 8), adapter("kept", 16)
    rig.want(used)
    rig.keep(kept)
    rig.keep(adapter("late", 16))
    for _ in range(100):
        rig.store.begin_step()
        rig.store.acquire(())
    assert rig.store.evictions == 0
    assert rig.agent.report().held == (kept,)
    rig.store.release(used)
    rig.drop(kept)
    assert [ref.name for ref, _ in rig.end_transfers()] == ["late"]


def test_what_was_dropped_and_is_displaced_is_gone_for_the_coordinator() -> None:
    rig = Rig()
    dropped = adapter("dropped", 16)
    rig.bring(adapter("left", 8))
    rig.keep(dropped)
    assert rig.store.retain(dropped)
    rig.drop(dropped)
    assert rig.agent.report().held == (dropped,)
    rig.want(adapter("large", 16))
    assert rig.agent.report().held == ()
    assert dropped.digest not in rig.store.ready


def test_the_base_model_needs_no_pages() -> None:
    rig = Rig()
    assert rig.store.retain(BASE)
    rig.store.prefetch((BASE,))
    rig.store.begin_step()
    rig.store.acquire((BASE,))
    rig.store.end_step((BASE,))
    rig.store.release(BASE)
    assert rig.transfers == []


def test_an_adapter_that_would_need_a_page_more_than_there_are_is_refused() -> None:
    rig = Rig()
    assert not rig.store.retain(AdapterRef("d", "d", 64, ("q_proj",), NUM_PAGES * MIB + 1))


def test_what_leaves_the_card_comes_back_from_the_hosts_memory() -> None:
    """32 MiB of card and 24 of host: the host keeps what left last, and only what left before needs a peer again."""
    rig = Rig(host_bytes=24 * MIB)
    first, second, third, fourth = (adapter(name, 16) for name in ("first", "second", "third", "fourth"))
    for ref in (first, second, third, fourth):
        rig.bring(ref)
    gone = [ref for ref in (first, second, third) if ref.digest not in rig.store.ready]
    left = [ref for ref in gone if rig.store.can_give(ref.digest)]
    assert (len(gone), len(left), rig.store.recalls) == (2, 1, 0)
    rig.bring(left[0])
    assert rig.ended[-1] == (left[0], ("n",)), "the node itself is the source"
    assert rig.store.recalls == 1
    rig.bring(next(ref for ref in gone if ref != left[0]))
    assert rig.ended[-1][1] == ()
    assert (rig.store.recalls, rig.store.fetches) == (1, 6)


def test_without_host_memory_what_leaves_the_card_is_gone() -> None:
    rig = Rig()
    refs = [adapter(name, 16) for name in ("first", "second", "third")]
    for ref in refs:
        rig.bring(ref)
    (gone,) = (ref for ref in refs if ref.digest not in rig.store.ready)
    assert not rig.store.can_give(gone.digest)
    rig.bring(gone)
    assert rig.ended[-1] == (gone, ())
    assert rig.store.recalls == 0
