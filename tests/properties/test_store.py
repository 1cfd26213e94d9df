"""Any sequence of loads, reloads, unloads, requests and steps keeps the store's invariants."""

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from lora.adapter import AdapterRef
from lora.errors import UnknownAdapter
from lora.format.peft import pack
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.segments import AdapterLease
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from scheduler.residency import CheapestWindow
from tests.chance import examples
from tests.lora.executors import HeldExecutor
from tests.oracles.adapters import base_shape, write_adapter

SHAPE = base_shape()
RANKS = (1, 2, 3, 5, 8)
NAMES = st.sampled_from(["a", "b", "c"])


@lru_cache
def shelf() -> tuple[Path, ...]:
    """PEFT folders of every rank, made once."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    return tuple(write_adapter(root / str(rank), SHAPE, rank, seed=rank) for rank in RANKS)


@lru_cache
def first_matrix(digest: str) -> torch.Tensor:
    """The content that a digest stands for, read afresh from its folder."""
    for folder in shelf():
        packed = pack("x", folder, SHAPE, torch.float32)
        if packed.ref.digest == digest:
            return packed.rows
    raise AssertionError(f"no folder has {digest}")


class StoreMachine(RuleBasedStateMachine):
    """Front threads, the step loop and the worker take turns in any order."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.executor = HeldExecutor()
        self.pages = RankPages(24, 2048)  # the largest adapter takes 22
        residency = Residency(self.pages, CheapestWindow())
        self.cache = tempfile.TemporaryDirectory()
        disk = DiskTier(Path(self.cache.name), capacity_bytes=40_000)
        self.store = AdapterStore(SHAPE, torch.float32, residency, disk, self.executor)
        self.model: dict[str, AdapterRef] = {}  # what each name must mean
        self.live: list[AdapterRef] = []
        self.planned: frozenset[str] | None = None  # what the last ready() named, until acquired
        self.lease: AdapterLease | None = None

    @rule(name=NAMES, folder=st.integers(0, len(RANKS) - 1))
    def load(self, name: str, folder: int) -> None:
        self.model[name] = self.store.registry.load(name, shelf()[folder])

    @rule(name=NAMES, folder=st.integers(0, len(RANKS) - 1))
    def declare(self, name: str, folder: int) -> None:
        self.store.registry.declare(name, shelf()[folder])
        self.model[name] = self.store.registry.resolve(name)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        try:
            self.store.registry.unload(name)
            assert self.model.pop(name, None) is not None
        except UnknownAdapter:
            assert name not in self.model

    @rule(target=requests, name=NAMES)
    def request(self, name: str) -> AdapterRef | object:
        if name not in self.model:
            return multiple()
        ref = self.store.registry.resolve(name)
        self.store.retain(ref)
        self.live.append(ref)
        return ref

    @rule(ref=consumes(requests))
    def finish(self, ref: AdapterRef) -> None:
        self.live.remove(ref)
        self.store.release(ref)

    @rule()
    def prefetch(self) -> None:
        self.store.loader.prefetch(self.live)

    @precondition(lambda self: self.lease is None)
    @rule()
    def plan(self) -> None:
        self.planned = self.store.ready()

    @precondition(lambda self: self.planned is not None)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        assert self.planned is not None
        digests = sorted(self.planned)
        chosen = [digest for digest in digests if data.draw(st.booleans())]
        self.lease = self.store.acquire([AdapterRef(digest, "", 1, (), 0) for digest in chosen])
        assert set(self.lease.weights) == set(chosen)
        self.planned = None

    @precondition(lambda self: self.lease is not None)
    @rule()
    def end_step(self) -> None:
        assert self.lease is not None
        self.lease.release()
        self.lease = None

    @rule()
    def work(self) -> None:
        self.executor.run()

    @invariant()
    def names_mean_what_was_loaded_last(self) -> None:
        assert set(self.store.registry.names()) == set(self.model)
        for name, ref in self.model.items():
            assert self.store.registry.resolve(name) == ref

    @invariant()
    def leased_bytes_are_the_content(self) -> None:
        for digest, weights in (self.lease.weights if self.lease else {}).items():
            group = next(iter(weights.groups.values()))
            packed = first_matrix(digest).view(torch.float32)[: group.A.numel()]
            assert torch.equal(group.A.flatten(), packed)

    @invariant()
    def requests_do_not_fail(self) -> None:
        assert self.store.failed() == {}

    def teardown(self) -> None:
        """When all requests and names are gone every page is free."""
        if self.lease:
            self.lease.release()
        for ref in self.live:
            self.store.release(ref)
        for name in tuple(self.model):
            self.store.registry.unload(name)
        self.executor.run()
        self.store.ready()
        self.store.acquire(()).release()
        assert self.store.stats().free_pages == self.pages.num_pages
        self.cache.cleanup()


class LivenessMachine(StoreMachine):
    """The same, and at the end every live request in turn gets its adapter, whatever came before."""

    def teardown(self) -> None:
        """An idle loop that keeps asking for the first waiting request's adapter gets it within a few steps."""
        if self.lease:
            self.lease.release()
            self.lease = None
        for ref in dict.fromkeys(self.live):
            for _ in range(7):
                if ref.digest in self.store.ready():  # a second look would be a step that did not run it
                    break
                self.store.loader.prefetch((ref,))
                self.executor.run()
            else:
                raise AssertionError(f"{ref} does not arrive")
            self.store.acquire((ref,)).release()
        super().teardown()


StoreMachine.TestCase.settings = settings(deadline=None, max_examples=examples(40), stateful_step_count=40)
LivenessMachine.TestCase.settings = settings(deadline=None, max_examples=examples(40), stateful_step_count=40)
TestStore = StoreMachine.TestCase
TestLiveness = LivenessMachine.TestCase
