"""Contents come and go without a step waiting for it, and each live request's has its turn."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from lora.errors import AdapterLost
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from scheduler.residency import CheapestWindow
from tests.lora.executors import HeldExecutor
from tests.lora.store_rig import BASE_SHAPE, PAGE_BYTES, PAGES_OF_RANK_4, StoreRig, first_weight
from tests.oracles.adapters import write_adapter


def test_prefetch_displaces_what_nobody_uses_and_brings_it_back_whole(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(2)
    refs = [s.load(seed) for seed in (1, 2, 3)]
    before = first_weight(s.store, refs[0])
    s.step(refs[1])  # 1 is now the less popular one, though both are resident
    s.step(refs[1])
    s.store.retain(refs[2])
    s.store.loader.prefetch((refs[2],))
    assert s.store.ready() == {refs[1].digest, refs[2].digest}
    s.store.acquire(()).release()
    s.store.release(refs[2])
    s.store.loader.prefetch((refs[0],))
    assert refs[0].digest in s.store.ready()
    assert torch.equal(first_weight(s.store, refs[0]), before)
    stats = s.store.stats()
    assert (stats.evictions, stats.hits["disk"]) == (2, 2)


def test_an_adapter_held_back_by_the_queue_gives_way_once_nothing_runs(
    make_rig: Callable[[int], StoreRig],
) -> None:
    """Two queued requests, room for one adapter, and the one without it is first in the queue."""
    s = make_rig(1)
    a, b = s.load(1), s.load(2)
    woken = threading.Event()
    s.store.loader.on_ready(woken.set)
    for ref in (a, b):
        s.store.retain(ref)
    assert s.store.ready() == {a.digest}
    s.store.loader.prefetch((b,))  # nothing of the plan ran
    assert s.store.ready() == {b.digest}
    assert woken.is_set()


def test_an_arrival_is_offered_to_a_plan_before_it_may_be_displaced(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(1)
    a, b = s.load(1), s.load(2)
    for ref in (a, b):
        s.store.retain(ref)
    s.store.ready()
    s.store.loader.prefetch((b, a))
    assert s.store.ready() == {b.digest}
    s.store.loader.prefetch((a,))
    assert s.store.ready() == {b.digest}
    assert s.store.ready() == {a.digest}, "b was offered and did not run"


def test_a_starving_adapter_displaces_one_that_has_not_run_for_long(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(2)
    a, b, c = s.load(1), s.load(2), s.load(3)
    for ref in (a, b, c):
        s.store.retain(ref)
    for _ in range(200):
        s.step(a)  # b's requests are queued behind c's
        s.store.loader.prefetch((c,))
    assert s.store.ready() == {a.digest, c.digest}


def test_a_content_that_changed_on_disk_fails_its_requests_and_no_others(tmp_path: Path) -> None:
    s = StoreRig(tmp_path, 1)
    a = s.load(1)
    b = s.load(2)
    (s.root / "cache" / f"{b.digest}.safetensors").unlink()
    write_adapter(s.root / "adapter-2", BASE_SHAPE, 4, seed=77)
    s.store.retain(b)
    s.store.registry.unload("a1")
    s.store.loader.prefetch((b,))
    assert isinstance(s.store.failed()[b.digest], AdapterLost)
    s.store.release(b)
    assert s.store.failed() == {}
    fresh = s.store.registry.resolve("a2")
    assert fresh not in (a, b)
    assert fresh.digest in s.store.ready()


def test_without_a_disk_the_old_content_of_a_reloaded_name_is_kept_in_memory(tmp_path: Path) -> None:
    s = StoreRig(tmp_path, 1, disk=False)
    a = s.load(1)
    old = s.load(2, "b")
    s.store.retain(old)
    write_adapter(s.root / "adapter-2", BASE_SHAPE, 4, seed=77)
    s.store.registry.load("b", s.root / "adapter-2")
    s.store.loader.prefetch((old,))
    assert s.store.ready() == {old.digest}
    assert s.store.stats().hits == {"device": 0, "host": 1, "source": 0}
    assert a.digest not in s.store.ready()


def test_a_damaged_packed_file_is_removed_and_the_folder_is_read_again(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(1)
    s.load(1)
    b = s.load(2)
    path = s.root / "cache" / f"{b.digest}.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    s.store.loader.prefetch((b,))
    assert b.digest in s.store.ready()
    assert s.store.stats().hits["source"] == 1
    assert not path.exists()


def test_arrivals_wake_the_loop_and_copies_do_not_block_steps(tmp_path: Path) -> None:
    executor = HeldExecutor()
    woken: list[frozenset[str]] = []
    pages = RankPages(2 * PAGES_OF_RANK_4, PAGE_BYTES)
    residency = Residency(pages, CheapestWindow())
    store = AdapterStore(BASE_SHAPE, torch.float32, residency, DiskTier(tmp_path / "cache"), executor)
    refs = [
        store.registry.load(f"a{seed}", write_adapter(tmp_path / f"{seed}", BASE_SHAPE, 4, seed))
        for seed in (1, 2, 3)
    ]
    store.loader.on_ready(lambda: woken.append(store.ready()))
    store.loader.prefetch((refs[2],))
    assert len(executor.jobs) == 1
    assert refs[2].digest not in store.ready()
    store.acquire((refs[1],)).release()
    assert woken == []
    executor.run()
    assert woken == [{refs[1].digest, refs[2].digest}]


def test_an_adapter_unloaded_while_it_arrives_is_freed(tmp_path: Path) -> None:
    executor = HeldExecutor()
    pages = RankPages(PAGES_OF_RANK_4, PAGE_BYTES)
    store = AdapterStore(BASE_SHAPE, torch.float32, Residency(pages, CheapestWindow()), None, executor)
    a = store.registry.load("a", write_adapter(tmp_path / "a", BASE_SHAPE, 4, 1))
    b = store.registry.load("b", write_adapter(tmp_path / "b", BASE_SHAPE, 4, 2))
    store.loader.prefetch((b,))
    store.registry.unload("b")
    executor.run()
    assert store.ready() == frozenset()
    assert store.stats().free_pages == pages.num_pages
    assert a.digest not in store.ready()
