"""Allocate this device's memory for K/V and for adapters: each its own, or one pool for both.

It may not know what computes: it asks the base model for sizes, and the other devices' processes for their writer.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.base.base_model import BaseModel
from engine.base.machine_memory import available_bytes, total_bytes
from engine.config.config import EngineConfig
from engine.errors import InvalidConfig
from engine.tensor_parallel.worker_pool import WorkerPool
from lora.memory.page_writer import PageWriter, PinnedWriter
from lora.memory.pages import RankPages
from lora.memory.sharded import ShardedWriter
from lora.target_modules import BaseShape
from model.kv_cache import KVCache
from scheduler.blocks import BlockPool
from scheduler.unified_pool import PoolSplit

_KV_SHARE = 0.5  # of the memory left after the weights, at most
_ADAPTER_SHARE = 0.25
_MAX_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The tensors of K/V and who holds their blocks, the adapters' pages, and the split of a pool that both share."""

    cache: KVCache
    blocks: BlockPool
    pages: RankPages
    split: PoolSplit | None


def allocate_memory(config: EngineConfig, base: BaseModel, workers: WorkerPool | None) -> DeviceMemory:
    """Take the memory that `config` grants, by default shares of what is available. Raises InvalidConfig."""
    page = _page_bytes(base.part.base_shape(), base.backends.lora_dtype)
    kv_bytes, adapter_bytes = _kv_bytes(config, base), _adapter_bytes(config, base, page)
    _check_total(base, kv_bytes, adapter_bytes)
    writer = _page_writer(config, base, workers)
    if _is_unified(config, base, workers):
        split = _split(config, base, kv_bytes, adapter_bytes, page)
        with _granted("kv_cache_bytes", kv_bytes):
            return _allocate_unified(config, base, split, page, writer)
    layout = base.kv_layout(config.block_size)
    with _granted("kv_cache_bytes", kv_bytes):
        cache = KVCache(layout, kv_bytes // layout.block_bytes, base.device)
    blocks = BlockPool(cache.num_blocks, cache.block_size)
    with _granted("adapter_bytes", adapter_bytes):
        pages = RankPages(adapter_bytes // page, page, base.device, writer)
    return DeviceMemory(cache, blocks, pages, None)


def _check_total(base: BaseModel, kv_bytes: int, adapter_bytes: int) -> None:
    """Refuse what this device never has, before any of it is taken. Raises InvalidConfig."""
    total = total_bytes(base.device)
    if kv_bytes + adapter_bytes > total:
        field, granted = max(
            ("kv_cache_bytes", kv_bytes), ("adapter_bytes", adapter_bytes), key=lambda each: each[1]
        )
        remedy = f"the device cannot give {kv_bytes} bytes for K/V and {adapter_bytes} for adapters"
        raise InvalidConfig(field, granted, f"{remedy}: it has {total} bytes in all, give less")


@contextmanager
def _granted(field: str, num_bytes: int) -> Generator[None]:
    """Raise InvalidConfig where the device does not give the memory that was asked for."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError) as error:  # what torch raises for it
        raise InvalidConfig(field, num_bytes, "the device cannot give so many bytes: give fewer") from error


def _is_unified(config: EngineConfig, base: BaseModel, workers: WorkerPool | None) -> bool:
    choice = config.unified_memory
    if choice == "on" and workers is not None:
        raise InvalidConfig(
            "unified_memory", choice, "devices that compute together have no such pool: use off"
        )
    return choice == "on" or (choice == "auto" and base.device.type == "cuda" and workers is None)


def _split(
    config: EngineConfig, base: BaseModel, kv_bytes: int, adapter_bytes: int, page_bytes: int
) -> PoolSplit:
    block_bytes = base.kv_layout(config.block_size).block_bytes
    least_blocks = -(-(config.max_model_len or 1) // config.block_size)
    try:
        return PoolSplit.of(kv_bytes, adapter_bytes, block_bytes, page_bytes, least_blocks)
    except ValueError as error:
        raise InvalidConfig("kv_cache_bytes", kv_bytes, str(error)) from error


def _allocate_unified(
    config: EngineConfig, base: BaseModel, split: PoolSplit, page_bytes: int, writer: PageWriter | None
) -> DeviceMemory:
    layout = base.kv_layout(config.block_size)
    with _granted("kv_cache_bytes", split.quanta * split.blocks * layout.block_bytes):
        arena, divided = _unified_arena(split, layout.block_bytes, base.device)
    cache = KVCache(layout, split.quanta * split.blocks, base.device, arena)
    pages = RankPages(split.first_pages, page_bytes, base.device, writer, divided)
    return DeviceMemory(cache, split.block_pool(config.block_size), pages, split)


def _unified_arena(
    split: PoolSplit, block_bytes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate [bytes] for all of it, with K/V's two extra blocks at its end; return that and the divided part."""
    divided = split.quanta * split.blocks * block_bytes
    whole = torch.empty(divided + 2 * block_bytes, dtype=torch.uint8, device=device)
    return whole, whole[:divided]


def _page_bytes(base: BaseShape, dtype: torch.dtype) -> int:
    """Return the size of a rank page: the largest power of two no larger than one rank row over all layers.

    So an adapter wastes less than a rank. It is at most 2 MiB, which moves at full bandwidth.
    """
    row = base.num_layers * dtype.itemsize * sum(s.in_features + s.out_features for s in base.shapes)
    return min(_MAX_PAGE_BYTES, 1 << (row.bit_length() - 1))


def _adapter_bytes(config: EngineConfig, base: BaseModel, page_bytes: int) -> int:
    granted = config.adapter_bytes or int(_device_bytes(base) * _ADAPTER_SHARE)
    if granted < page_bytes:
        raise InvalidConfig("adapter_bytes", granted, f"give at least one rank page of {page_bytes} bytes")
    return granted


def _kv_bytes(config: EngineConfig, base: BaseModel) -> int:
    """Return what was granted; by default what all sequences could use, within a share of the memory."""
    block_bytes = base.kv_layout(config.block_size).block_bytes
    granted = config.kv_cache_bytes or int(_device_bytes(base) * _KV_SHARE)
    if config.kv_cache_bytes is None:
        length = config.max_model_len or base.config.max_model_len
        granted = min(granted, block_bytes * config.max_num_seqs * -(-length // config.block_size))
    if granted < block_bytes:
        raise InvalidConfig("kv_cache_bytes", granted, f"give at least one block of {block_bytes} bytes")
    return granted


def _page_writer(config: EngineConfig, base: BaseModel, workers: WorkerPool | None) -> PageWriter | None:
    """Return how adapters come into the pages; None writes them directly, as peers do."""
    if workers is not None:
        return ShardedWriter(base.shard_specs(), workers.deliver, base.device)
    return PinnedWriter(base.device) if base.device.type == "cuda" and not config.peers.enabled else None


def _device_bytes(base: BaseModel) -> int:
    """Return what this device may take of the memory that is available; the processes of a CPU share one."""
    available = available_bytes(base.device)
    return available // base.form.shard.size if base.device.type == "cpu" else available
