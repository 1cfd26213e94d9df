"""One content on several devices: each keeps its part at the same offset, and one device's pages stand for all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.adapter import AdapterRef
from lora.format.packed import Module, PackedLayout, digest_of, packed_layout
from lora.format.peft import PackedAdapter
from lora.format.sharding import shard_layout, shard_rows
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.memory.sharded import ShardArena, ShardDelivery, ShardedWriter
from lora.segments import AdapterWeights
from lora.store.store import AdapterStore
from lora.target_modules import SITES
from scheduler.residency import CheapestWindow
from tests.lora.executors import InlineExecutor
from tests.lora.test_sharding import BASE, cut_of, filled
from tests.oracles.adapters import write_adapter

CPU = torch.device("cpu")
PAGE = 1024


def packed_of(rank: int, sites: tuple[str, ...] = SITES) -> PackedAdapter:
    layout = packed_layout(BASE, torch.float32, [Module(0, site, rank, 0.5) for site in sites])
    rows = filled(layout)
    return PackedAdapter(AdapterRef(digest_of(layout, rows), "a", rank, sites, layout.nbytes), layout, rows)


def same(found: AdapterWeights, packed: PackedAdapter, rank: int) -> bool:
    """Whether `found` is the share of device `rank` of two."""
    layout = shard_layout(packed.layout, cut_of(rank, 2))
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    shard_rows(packed.rows, packed.layout, cut_of(rank, 2), rows)
    return torch.equal(bytes_of(found, layout), rows)


def bytes_of(weights: AdapterWeights, layout: PackedLayout) -> Tensor:
    first = weights.groups[layout.places[0].layer, layout.places[0].group].A
    return torch.tensor(first.untyped_storage().tolist(), dtype=torch.uint8)[
        first.storage_offset() * 4 - layout.places[0].a_start * 4 :
    ][: layout.nbytes]


def test_each_device_keeps_its_part_at_the_same_offset() -> None:
    deliveries: list[ShardDelivery] = []
    writer = ShardedWriter([cut_of(0, 2), cut_of(1, 2)], deliveries.append, CPU)
    pages = RankPages(16, PAGE, writer=writer)
    packed = packed_of(3)
    pages.allocate(PAGE)
    run = pages.allocate(writer.nbytes(packed.layout))
    assert run is not None
    rows = pages.rows(run)
    staged = writer.staging_buffer(rows, packed.layout)
    staged.copy_(packed.rows)
    assert same(writer.write(rows, staged, packed.layout, "d"), packed, 0)
    (delivery,) = deliveries
    assert (delivery.rank, delivery.digest, delivery.offset) == (1, "d", PAGE)
    other = ShardArena(pages.nbytes, CPU)
    other.write("d", delivery.layout, delivery.offset, delivery.rows)
    assert same(other.weights("d"), packed, 1)


def test_what_lies_where_another_comes_is_forgotten() -> None:
    layout = shard_layout(packed_of(2).layout, cut_of(1, 2))
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    arena = ShardArena(3 * layout.nbytes, CPU)
    for number, digest in enumerate("abc"):
        arena.write(digest, layout, number * layout.nbytes, rows)
    arena.write("d", layout, layout.nbytes // 2 // 64 * 64, rows)  # over a's end and b's beginning
    assert arena.weights("c").digest == "c"
    assert arena.weights("d").digest == "d"
    for digest in "ab":
        with pytest.raises(KeyError):
            arena.weights(digest)


@pytest.mark.parametrize("offset", [-64, 64])
def test_a_share_beyond_the_arena_is_refused(offset: int) -> None:
    layout = shard_layout(packed_of(2).layout, cut_of(1, 2))
    arena = ShardArena(layout.nbytes, CPU)
    with pytest.raises(ValueError, match="not within"):
        arena.write("a", layout, offset, torch.zeros(layout.nbytes, dtype=torch.uint8))


def test_the_store_counts_shares_and_keeps_every_device_in_step(tmp_path: Path) -> None:
    """Loads, evictions and reloads through the store: the other device always has what is ready here."""
    ranks = {"a": 4, "b": 5, "c": 6}
    folders = {name: write_adapter(tmp_path / name, BASE, rank, seed=rank) for name, rank in ranks.items()}
    other: list[ShardArena] = []
    writer = ShardedWriter(
        [cut_of(0, 2), cut_of(1, 2)], lambda d: other[0].write(d.digest, d.layout, d.offset, d.rows), CPU
    )
    pages = RankPages(34, PAGE, writer=writer)
    other.append(ShardArena(pages.nbytes, CPU))
    store = AdapterStore(BASE, torch.float32, Residency(pages, CheapestWindow()), None, InlineExecutor())
    refs = {name: store.registry.load(name, folder) for name, folder in folders.items()}
    for name in ("a", "b", "c", "a", "c", "b"):
        store.retain(refs[name])
        for _ in range(4):
            store.loader.prefetch((refs[name],))
            if refs[name].digest in store.ready():
                break
        with store.acquire((refs[name],)) as lease:
            ours = lease.weights[refs[name].digest]
            theirs = other[0].weights(refs[name].digest)
            assert ours.groups.keys() == theirs.groups.keys()
            for key, group in ours.groups.items():
                assert group.A.shape == theirs.groups[key].A.shape
        store.release(refs[name])
    stats = store.stats()
    assert stats.evictions > 0
    assert stats.resident_bytes < sum(refs[name].nbytes for name in ranks)
