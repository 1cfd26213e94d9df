"""The simulated store is the live one without bytes: the same requests and steps leave the same adapters resident."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora.adapter import AdapterRef
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.segments import AdapterLease
from lora.store.store import AdapterStore
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.state import OperatingPoints
from scheduler.residency import CheapestWindow
from scheduler.sim.memory.store import AdapterMemory, SimStore, StoreSpec
from scheduler.sim.network import CopySpeeds
from tests.chance import examples
from tests.lora.executors import HeldExecutor
from tests.oracles.adapters import base_shape, write_adapter

PAGE_BYTES = 2048
NUM_PAGES = 20
RANKS = (1, 1, 1, 2, 2, 2, 3, 3, 5)  # of 3 pages each, or a little less
HOST_MEMORY = CopySpeeds(peer_bytes_per_s=10e9, latency_s=1e-4)
"""What HostTier takes a reload to cost, which is the live store's first tier here."""

SHAPE = base_shape()
ADAPTERS = st.integers(0, len(RANKS) - 1)


@lru_cache
def shelf() -> tuple[Path, ...]:
    """PEFT folders with contents of their own, made once."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    return tuple(write_adapter(root / str(at), SHAPE, rank, seed=at) for at, rank in enumerate(RANKS))


class StoresMachine(RuleBasedStateMachine):
    """One history for both stores: requests come and go, steps run some of what is resident, bytes arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.executor = HeldExecutor()
        residency = Residency(RankPages(NUM_PAGES, PAGE_BYTES), CheapestWindow())
        self.live = AdapterStore(SHAPE, torch.float32, residency, None, self.executor)
        self.arrivals: list[Callable[[], None]] = []
        machine = NodeHardware(NUM_PAGES * PAGE_BYTES, OperatingPoints((8,), (1.0,)))
        memory = AdapterMemory(machine.memory_bytes, NUM_PAGES)
        spec = StoreSpec(PAGE_BYTES, CheapestWindow(), HOST_MEMORY)
        self.simulated = SimStore(NodeAgent("n", machine), memory, spec, self._transfer, lambda: None)
        self.refs: list[AdapterRef] = []
        self.users: list[AdapterRef] = []
        self.planned: list[AdapterRef] | None = None
        self.lease: tuple[AdapterLease, list[AdapterRef]] | None = None
        self._load_all()

    def _transfer(self, ref: AdapterRef, sources: Sequence[str], done: Callable[[], None]) -> None:
        self.arrivals.append(done)

    def _load_all(self) -> None:
        """Loading fills free pages at once, and displaces nobody."""
        self.live.ready()
        self.simulated.begin_step()
        for at, folder in enumerate(shelf()):
            ref = self.live.registry.load(f"a{at}", folder)
            self.refs.append(ref)
            assert self.simulated.retain(ref)
            self.simulated.prefetch((ref,))
            while self.arrivals:
                self.arrivals.pop()()
            self.simulated.release(ref)
        self.simulated.prefetch(())

    @rule(at=ADAPTERS)
    def request(self, at: int) -> None:
        ref = self.refs[at]
        self.users.append(ref)
        self.live.retain(ref)
        assert self.simulated.retain(ref)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ref = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.live.release(ref)
        self.simulated.release(ref)

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        refs = data.draw(st.permutations(list(dict.fromkeys(self.users))))
        self.live.loader.prefetch(refs)
        self.simulated.prefetch(refs)

    @rule(data=st.data())
    def make_way(self, data: st.DataObject) -> None:
        """For what a request waits for, or for none any more, while some sequences run."""
        ref = data.draw(st.sampled_from([None, *self.users]))
        running = frozenset(each.digest for each in self.users if data.draw(st.booleans()))
        assert self.simulated.make_way(ref, running) == self.live.make_way(ref, running)

    @precondition(lambda self: self.lease is None)
    @rule()
    def plan(self) -> None:
        resident = self.live.ready()
        assert set(self.simulated.begin_step()) == resident
        self.planned = [ref for ref in self.refs if ref.digest in resident]

    @precondition(lambda self: self.planned is not None)
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        assert self.planned is not None
        chosen = [ref for ref in self.planned if data.draw(st.booleans())]
        self.lease = self.live.acquire(chosen), chosen
        self.simulated.acquire(chosen)
        self.planned = None

    @precondition(lambda self: self.lease is not None)
    @rule()
    def end_step(self) -> None:
        assert self.lease is not None
        lease, chosen = self.lease
        lease.release()
        self.simulated.end_step(chosen)
        self.lease = None

    @precondition(lambda self: self.lease is None)
    @rule(at=ADAPTERS, steps=st.sampled_from((1, 1, 2, 5, 64, 70)))
    def serve(self, at: int, steps: int) -> None:
        """One request from its start to its end; what waits beside a long one runs out of patience."""
        ref = self.refs[at]
        self.request(at)
        for _ in range(steps):
            self.plan()
            self.live.loader.prefetch((ref,))
            self.simulated.prefetch((ref,))
            self.work()
            assert self.planned is not None
            chosen = [each for each in self.planned if each == ref]
            if chosen:
                self.simulated.acquire(chosen)
                self.live.acquire(chosen).release()
                self.simulated.end_step(chosen)
        self.planned = None
        self.users.remove(ref)
        self.live.release(ref)
        self.simulated.release(ref)

    @rule()
    def work(self) -> None:
        """All bytes on their way arrive."""
        while self.executor.jobs or self.arrivals:
            assert len(self.executor.jobs) == len(self.arrivals)
            self.executor.jobs.pop(0)()
            self.arrivals.pop(0)()

    @invariant()
    def both_have_moved_the_same(self) -> None:
        stats = self.live.stats()
        assert stats.evictions == self.simulated.evictions
        assert stats.resident == len(self.simulated.ready)
        assert len(self.executor.jobs) == len(self.arrivals)
        self.simulated.check()


StoresMachine.TestCase.settings = settings(deadline=None, max_examples=examples(40), stateful_step_count=40)
TestStores = StoresMachine.TestCase


def test_what_waits_may_displace_others_as_soon_as_the_step_has_its_lease() -> None:
    both = StoresMachine()
    both.serve(at=4, steps=1)
    both.plan()
    both.request(at=3)
    first = both.refs[3:4]
    both.live.loader.prefetch(first)
    both.simulated.prefetch(first)
    both.both_have_moved_the_same()
    both.live.acquire(())
    both.simulated.acquire(())
    both.both_have_moved_the_same()
    assert both.simulated.evictions == 3
