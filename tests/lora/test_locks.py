"""The store's locks are taken in their stated order, and nothing that may wait or call back runs under them."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

from lora.adapter import AdapterRef
from lora.errors import AdapterLost, AdapterRefused, UnknownAdapter
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from scheduler.residency import CheapestWindow
from tests.lora.store_rig import BASE_SHAPE, PAGE_BYTES, PAGES_OF_RANK_4
from tests.oracles.adapters import write_adapter

ROUNDS, FRONTS = 25, 4
NAMES = ("a", "b", "c")


class Held(threading.local):
    """The orders of the locks that the current thread holds, the first taken first."""

    def __init__(self) -> None:
        self.orders: list[int] = []


class OrderedLock:
    """A lock that refuses to be taken out of order."""

    def __init__(self, order: int, held: Held) -> None:
        self._lock = threading.Lock()
        self._order = order
        self._held = held

    def __enter__(self) -> None:
        assert all(order < self._order for order in self._held.orders), (self._held.orders, self._order)
        self._lock.acquire()
        self._held.orders.append(self._order)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.orders.remove(self._order)
        self._lock.release()


class WatchedExecutor(ThreadPoolExecutor):
    """Threads whose jobs are submitted, and begin and end, under no lock of the store."""

    def __init__(self, held: Held) -> None:
        super().__init__(2)
        self._held = held
        self.failures: list[BaseException] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert not self._held.orders
        job = super().submit(fn, *args, **kwargs)
        job.add_done_callback(self._check)
        return job

    def _check(self, job: Future[Any]) -> None:
        error = job.exception()
        if error is not None:
            self.failures.append(error)


class WatchedStore:
    """A store whose locks watch their order, over an arena of three adapters that can shrink to two."""

    def __init__(self, root: Path) -> None:
        self.held = Held()
        self.executor = WatchedExecutor(self.held)
        self.pages = RankPages(3 * PAGES_OF_RANK_4, PAGE_BYTES)
        self.cache = root / "cache"
        residency = Residency(self.pages, CheapestWindow())
        self.store = AdapterStore(BASE_SHAPE, torch.float32, residency, DiskTier(self.cache), self.executor)
        self.store.registry._table.lock = OrderedLock(0, self.held)  # pyright: ignore[reportAttributeAccessIssue]
        self.store.contents._lock = OrderedLock(1, self.held)  # pyright: ignore[reportAttributeAccessIssue]
        self.store.loader.on_ready(self._check_free)
        self.folders = [write_adapter(root / f"{seed}", BASE_SHAPE, 4, seed) for seed in range(6)]

    def front(self, turn: int) -> None:
        """Use names and contents as a front thread does, in an order of its own."""
        chance, store = random.Random(turn), self.store
        for _ in range(ROUNDS):
            name, folder = chance.choice(NAMES), chance.choice(self.folders)
            try:
                chance.choice((store.registry.load, store.registry.declare))(name, folder)
                self._request(store.registry.resolve(name))
                if chance.random() < 0.3:
                    store.registry.unload(name)
            except (UnknownAdapter, AdapterRefused):
                pass  # another thread has unloaded the name
            store.registry.entries()
            store.stats()

    def lose(self) -> None:
        """Take packed forms away from under the store, so that some have to be packed again."""
        for _ in range(ROUNDS):
            for path in sorted(self.cache.glob("*.safetensors"))[:1]:
                path.unlink(missing_ok=True)

    def steps(self, fronts: Sequence[threading.Thread]) -> None:
        """Plan, move the arena's end, and run whatever is ready, while there are fronts."""
        store = self.store
        while any(thread.is_alive() for thread in fronts):
            if self.pages.num_pages == 3 * PAGES_OF_RANK_4:
                store.contents.cede(PAGES_OF_RANK_4)
            elif store.contents.lacking_pages():
                store.contents.extend(PAGES_OF_RANK_4)
            ready = store.ready()
            with store.acquire([AdapterRef(digest, "", 4, (), 0) for digest in sorted(ready)]) as lease:
                assert set(lease.weights) == ready

    def assert_nothing_is_left(self) -> None:
        """Every name goes; then every page must be free, and no content known."""
        for name in self.store.registry.names():
            self.store.registry.unload(name)
        self.store.close()
        self.store.ready()
        self.store.acquire(()).release()
        assert self.executor.failures == []
        assert self.pages.free_pages == self.pages.num_pages
        assert not list(self.store.contents._residency.contents)

    def _request(self, ref: AdapterRef) -> None:
        self.store.retain(ref)
        try:
            self.store.loader.prefetch((ref,))
            failed = self.store.failed().get(ref.digest)
            assert failed is None or isinstance(failed, AdapterLost)
        finally:
            self.store.release(ref)

    def _check_free(self) -> None:
        assert not self.held.orders


@pytest.mark.parametrize("attempt", range(2))
def test_locks_are_taken_in_order_and_free_when_others_are_called(tmp_path: Path, attempt: int) -> None:
    """Front threads, workers, a step loop and a failing disk at once; all ends, and nothing is left."""
    watched = WatchedStore(tmp_path)
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)
                raise

        return run

    work = [guarded(lambda turn=turn: watched.front(FRONTS * attempt + turn)) for turn in range(FRONTS)]
    fronts = [threading.Thread(target=one) for one in (*work, guarded(watched.lose))]
    for thread in fronts:
        thread.start()
    watched.steps(fronts)
    for thread in fronts:
        thread.join()
    watched.assert_nothing_is_left()
    assert failures == []


def test_a_lock_out_of_order_is_refused() -> None:
    held = Held()
    first, second = OrderedLock(0, held), OrderedLock(1, held)
    with first, second:
        pass
    with second, pytest.raises(AssertionError), first:
        pass
    assert not held.orders
