"""The store's promises: names change at once, contents stay while they are used, a plan can always run, and a
broken adapter leaves no trace."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora.adapter import BASE, AdapterRef
from lora.errors import AdapterLost, AdapterRefused, UnknownAdapter
from lora.pool import RankPages
from lora.store import AdapterStore
from lora.tiers import DiskTier
from tests.lora.executors import HeldExecutor, InlineExecutor
from tests.oracles.adapters import base_shape, write_adapter

BASE_SHAPE = base_shape()
PAGE_BYTES = 4096
PAGES_OF_RANK_4 = 6  # 3 layers, all sites, float32: 21.75 KiB


class Shelf:
    """A store over a small arena with numbered adapters of rank 4, and how to bring them in."""

    def __init__(self, root: Path, adapters_that_fit: int, *, disk: bool = True) -> None:
        self.root = root
        self.pages = RankPages(adapters_that_fit * PAGES_OF_RANK_4, PAGE_BYTES)
        self.executor = InlineExecutor()
        tier = DiskTier(root / "cache") if disk else None
        self.store = AdapterStore(BASE_SHAPE, torch.float32, self.pages, tier, self.executor)

    def folder(self, seed: int, rank: int = 4) -> Path:
        """A PEFT folder with content of its own for each seed."""
        return write_adapter(self.root / f"adapter-{seed}", BASE_SHAPE, rank, seed)

    def load(self, seed: int, name: str | None = None) -> AdapterRef:
        return self.store.load(name or f"a{seed}", self.folder(seed))

    def step(self, *refs: AdapterRef) -> None:
        """One step that runs these adapters."""
        assert {ref.digest for ref in refs} <= self.store.ready()
        self.store.acquire(refs).release()


@pytest.fixture
def shelf(tmp_path: Path) -> Callable[[int], Shelf]:
    return lambda adapters_that_fit: Shelf(tmp_path, adapters_that_fit)


def first_weight(store: AdapterStore, ref: AdapterRef) -> torch.Tensor:
    """A copy of the first matrix of a resident adapter."""
    assert ref.digest in store.ready()
    with store.acquire((ref,)) as lease:
        return next(iter(lease.weights[ref.digest].groups.values())).A.clone()


def test_load_makes_resident_and_names(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    ref = s.load(1)
    assert s.store.ready() == {ref.digest}
    assert s.store.resolve("a1") == ref
    assert s.store.names() == ("a1",)
    assert (ref.rank, ref.name) == (4, "a1")
    stats = s.store.stats()
    assert (stats.resident, stats.resident_bytes, stats.free_pages) == (1, ref.nbytes, PAGES_OF_RANK_4)


def test_declared_adapters_are_read_on_first_use(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    folder = s.folder(1)
    s.store.declare("lazy", folder)
    assert [(entry.name, entry.ref) for entry in s.store.entries()] == [("lazy", None)]
    ref = s.store.resolve("lazy")
    assert s.store.entries()[0].ref == ref
    assert ref.digest in s.store.ready()


def test_declare_refuses_a_folder_without_configuration(
    shelf: Callable[[int], Shelf], tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json"):
        shelf(1).store.declare("empty", tmp_path)


def test_unknown_names_are_told(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    with pytest.raises(UnknownAdapter, match="ghost"):
        s.store.resolve("ghost")
    with pytest.raises(UnknownAdapter, match="ghost"):
        s.store.unload("ghost")


def test_the_base_needs_no_adapter(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    s.store.retain(BASE)
    s.store.ready()
    with s.store.acquire((BASE,)) as lease:
        assert lease.weights == {}
    s.store.release(BASE)


def test_loading_the_same_content_again_changes_nothing(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    first = s.load(1)
    again = s.load(1)
    assert again == first
    stats = s.store.stats()
    assert (stats.resident, stats.loads) == (1, 1)


def test_two_names_share_one_content(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    first, second = s.load(1, "x"), s.load(1, "y")
    assert first == second
    assert (first.name, second.name) == ("x", "y")
    s.store.unload("x")
    assert s.store.ready() == {second.digest}
    s.store.unload("y")
    s.step()
    assert s.store.stats().free_pages == s.pages.num_pages


def test_a_reload_is_safe_for_requests_on_the_old_content(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    old = s.load(1, "a")
    s.store.retain(old)
    before = first_weight(s.store, old)
    new = s.load(2, "a")
    assert new != old
    assert s.store.resolve("a") == new
    assert torch.equal(first_weight(s.store, old), before)
    assert not torch.equal(first_weight(s.store, new), before)
    s.store.release(old)
    assert s.store.ready() == {new.digest}
    with pytest.raises(UnknownAdapter):
        s.store.retain(old)


def test_unload_drains_then_frees(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    ref = s.load(1)
    s.store.retain(ref)
    s.store.ready()
    lease = s.store.acquire((ref,))
    s.store.unload("a1")
    with pytest.raises(UnknownAdapter):
        s.store.resolve("a1")
    s.store.release(ref)
    assert s.store.stats().free_pages == 0, "leased"
    assert lease.weights[ref.digest].groups
    lease.release()
    assert s.store.stats().free_pages == s.pages.num_pages


@pytest.mark.parametrize("resident", [True, False])
def test_a_broken_adapter_leaves_no_trace(shelf: Callable[[int], Shelf], resident: bool) -> None:
    s = shelf(2)
    ref = s.load(1, "a")
    if not resident:
        s.load(2)
        s.load(3)
    before, names = s.store.stats(), s.store.names()
    bad = s.folder(9)
    weights = bad / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterRefused, match="truncated"):
        s.store.load("a", bad)
    assert s.store.stats() == before
    assert s.store.names() == names
    assert s.store.resolve("a") == ref


def test_an_adapter_larger_than_the_arena_is_refused_with_the_numbers(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    with pytest.raises(AdapterRefused, match=rf"\d+ bytes.* {s.pages.nbytes} bytes"):
        s.store.load("big", s.folder(1, rank=8))
    assert s.store.names() == ()


def test_prefetch_displaces_what_nobody_uses_and_brings_it_back_whole(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    refs = [s.load(seed) for seed in (1, 2, 3)]
    before = first_weight(s.store, refs[0])
    s.step(refs[1])  # 1 is now the less popular one, though both are resident
    s.step(refs[1])
    s.store.retain(refs[2])
    s.store.prefetch((refs[2],))
    assert s.store.ready() == {refs[1].digest, refs[2].digest}
    s.store.acquire(()).release()
    s.store.release(refs[2])
    s.store.prefetch((refs[0],))
    assert refs[0].digest in s.store.ready()
    assert torch.equal(first_weight(s.store, refs[0]), before)
    stats = s.store.stats()
    assert (stats.evictions, stats.hits["disk"]) == (2, 2)


def test_nothing_is_evicted_between_ready_and_acquire(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    a, b = s.load(1), s.load(2)
    s.store.retain(a)
    ready = s.store.ready()
    s.store.release(a)  # its request left after the plan was made
    s.store.prefetch((b,))
    s.store.unload("a1")
    assert a.digest in ready
    with s.store.acquire((a,)) as lease:
        assert lease.weights[a.digest].groups
    assert s.store.ready() == {b.digest}


def test_live_requests_keep_their_adapters_while_steps_run(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    a, b = s.load(1), s.load(2)
    s.store.retain(a)
    s.store.retain(b)
    for _ in range(100):
        s.step(a)
        s.store.prefetch((b,))
    assert s.store.ready() == {a.digest}
    s.store.acquire((a,)).release()
    s.store.release(a)
    assert s.store.ready() == {b.digest}


def test_an_adapter_held_back_by_the_queue_gives_way_once_nothing_runs(shelf: Callable[[int], Shelf]) -> None:
    """Two queued requests, room for one adapter, and the one without it is first in the queue."""
    s = shelf(1)
    a, b = s.load(1), s.load(2)
    woken = threading.Event()
    s.store.on_ready(woken.set)
    for ref in (a, b):
        s.store.retain(ref)
    assert s.store.ready() == {a.digest}
    s.store.prefetch((b,))  # nothing of the plan ran
    assert s.store.ready() == {b.digest}
    assert woken.is_set()


def test_an_arrival_is_offered_to_a_plan_before_it_may_be_displaced(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    a, b = s.load(1), s.load(2)
    for ref in (a, b):
        s.store.retain(ref)
    s.store.ready()
    s.store.prefetch((b, a))
    assert s.store.ready() == {b.digest}
    s.store.prefetch((a,))
    assert s.store.ready() == {b.digest}
    assert s.store.ready() == {a.digest}, "b was offered and did not run"


def test_a_starving_adapter_displaces_one_that_has_not_run_for_long(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(2)
    a, b, c = s.load(1), s.load(2), s.load(3)
    for ref in (a, b, c):
        s.store.retain(ref)
    for _ in range(200):
        s.step(a)  # b's requests are queued behind c's
        s.store.prefetch((c,))
    assert s.store.ready() == {a.digest, c.digest}


def test_a_content_that_changed_on_disk_fails_its_requests_and_no_others(tmp_path: Path) -> None:
    s = Shelf(tmp_path, 1)
    a = s.load(1)
    b = s.load(2)
    (s.root / "cache" / f"{b.digest}.safetensors").unlink()
    write_adapter(s.root / "adapter-2", BASE_SHAPE, 4, seed=77)
    s.store.retain(b)
    s.store.unload("a1")
    s.store.prefetch((b,))
    assert isinstance(s.store.failed()[b.digest], AdapterLost)
    s.store.release(b)
    assert s.store.failed() == {}
    fresh = s.store.resolve("a2")
    assert fresh not in (a, b)
    assert fresh.digest in s.store.ready()


def test_without_a_disk_the_old_content_of_a_reloaded_name_is_kept_in_memory(tmp_path: Path) -> None:
    s = Shelf(tmp_path, 1, disk=False)
    a = s.load(1)
    old = s.load(2, "b")
    s.store.retain(old)
    write_adapter(s.root / "adapter-2", BASE_SHAPE, 4, seed=77)
    s.store.load("b", s.root / "adapter-2")
    s.store.prefetch((old,))
    assert s.store.ready() == {old.digest}
    assert s.store.stats().hits == {"device": 0, "host": 1, "source": 0}
    assert a.digest not in s.store.ready()


def test_a_damaged_packed_file_is_removed_and_the_folder_is_read_again(shelf: Callable[[int], Shelf]) -> None:
    s = shelf(1)
    s.load(1)
    b = s.load(2)
    path = s.root / "cache" / f"{b.digest}.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    s.store.prefetch((b,))
    assert b.digest in s.store.ready()
    assert s.store.stats().hits["source"] == 1
    assert not path.exists()


def test_arrivals_wake_the_loop_and_copies_do_not_block_steps(tmp_path: Path) -> None:
    executor = HeldExecutor()
    woken: list[frozenset[str]] = []
    pages = RankPages(2 * PAGES_OF_RANK_4, PAGE_BYTES)
    store = AdapterStore(BASE_SHAPE, torch.float32, pages, DiskTier(tmp_path / "cache"), executor)
    refs = [
        store.load(f"a{seed}", write_adapter(tmp_path / f"{seed}", BASE_SHAPE, 4, seed)) for seed in (1, 2, 3)
    ]
    store.on_ready(lambda: woken.append(store.ready()))
    store.prefetch((refs[2],))
    assert len(executor.jobs) == 1
    assert refs[2].digest not in store.ready()
    store.acquire((refs[1],)).release()
    assert woken == []
    executor.run()
    assert woken == [{refs[1].digest, refs[2].digest}]


def test_an_adapter_unloaded_while_it_arrives_is_freed(tmp_path: Path) -> None:
    executor = HeldExecutor()
    pages = RankPages(PAGES_OF_RANK_4, PAGE_BYTES)
    store = AdapterStore(BASE_SHAPE, torch.float32, pages, None, executor)
    a = store.load("a", write_adapter(tmp_path / "a", BASE_SHAPE, 4, 1))
    b = store.load("b", write_adapter(tmp_path / "b", BASE_SHAPE, 4, 2))
    store.prefetch((b,))
    store.unload("b")
    executor.run()
    assert store.ready() == frozenset()
    assert store.stats().free_pages == pages.num_pages
    assert a.digest not in store.ready()


def test_threads_may_load_resolve_and_unload_while_steps_run(tmp_path: Path) -> None:
    """Real threads: every step's lease holds what it should, and in the end everything is free again."""
    pages = RankPages(3 * PAGES_OF_RANK_4, PAGE_BYTES)
    store = AdapterStore(BASE_SHAPE, torch.float32, pages, DiskTier(tmp_path / "cache"), workers=2)
    folders = [write_adapter(tmp_path / f"{seed}", BASE_SHAPE, 4, seed) for seed in range(6)]
    failures: list[BaseException] = []
    arrived = threading.Event()
    store.on_ready(arrived.set)

    def serve(turn: int) -> None:
        """Load, use and unload adapters, as front threads do."""
        try:
            for round_ in range(6):
                name = f"t{turn}-{round_}"
                store.load(name, folders[(turn + round_) % len(folders)])
                ref = store.resolve(name)
                store.retain(ref)
                store.prefetch((ref,))
                store.unload(name)
                store.release(ref)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=serve, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ready = store.ready()
        live = [AdapterRef(digest, "", 4, (), 0) for digest in sorted(ready)]
        with store.acquire(live) as lease:
            assert set(lease.weights) == ready
        arrived.wait(0.001)
    for thread in threads:
        thread.join()
    store.ready()
    store.acquire(()).release()
    store.close()
    assert failures == []
    assert store.stats().free_pages == pages.num_pages
