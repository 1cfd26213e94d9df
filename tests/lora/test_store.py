"""The store's promises: what a plan was made of can always run, whoever loads and unloads meanwhile."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from lora.adapter import BASE, AdapterRef
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from scheduler.residency import CheapestWindow
from tests.lora.store_rig import BASE_SHAPE, PAGE_BYTES, PAGES_OF_RANK_4, StoreRig
from tests.oracles.adapters import write_adapter


def test_the_base_needs_no_adapter(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(1)
    s.store.retain(BASE)
    s.store.ready()
    with s.store.acquire((BASE,)) as lease:
        assert lease.weights == {}
    s.store.release(BASE)


def test_nothing_is_evicted_between_ready_and_acquire(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(1)
    a, b = s.load(1), s.load(2)
    s.store.retain(a)
    ready = s.store.ready()
    s.store.release(a)  # its request left after the plan was made
    s.store.loader.prefetch((b,))
    s.store.registry.unload("a1")
    assert a.digest in ready
    with s.store.acquire((a,)) as lease:
        assert lease.weights[a.digest].groups
    assert s.store.ready() == {b.digest}


def test_live_requests_keep_their_adapters_while_steps_run(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(1)
    a, b = s.load(1), s.load(2)
    s.store.retain(a)
    s.store.retain(b)
    for _ in range(100):
        s.step(a)
        s.store.loader.prefetch((b,))
    assert s.store.ready() == {a.digest}
    s.store.acquire((a,)).release()
    s.store.release(a)
    assert s.store.ready() == {b.digest}


def test_threads_may_load_resolve_and_unload_while_steps_run(tmp_path: Path) -> None:
    """Real threads: every step's lease holds what it should, and in the end everything is free again."""
    pages = RankPages(3 * PAGES_OF_RANK_4, PAGE_BYTES)
    residency = Residency(pages, CheapestWindow())
    store = AdapterStore(BASE_SHAPE, torch.float32, residency, DiskTier(tmp_path / "cache"), workers=2)
    folders = [write_adapter(tmp_path / f"{seed}", BASE_SHAPE, 4, seed) for seed in range(6)]
    failures: list[BaseException] = []
    arrived = threading.Event()
    store.loader.on_ready(arrived.set)

    def serve(turn: int) -> None:
        """Load, use and unload adapters, as front threads do."""
        try:
            for round_ in range(6):
                name = f"t{turn}-{round_}"
                store.registry.load(name, folders[(turn + round_) % len(folders)])
                ref = store.registry.resolve(name)
                store.retain(ref)
                store.loader.prefetch((ref,))
                store.registry.unload(name)
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
