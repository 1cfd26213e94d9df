"""Allocate this device's memory for K/V and for adapters: each its own, or one pool for both."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.base_model import BaseModel
from engine.config.config import EngineConfig
from engine.errors import InvalidConfig
from engine.tensor_parallel.worker_pool import WorkerPool
from engine.unified_pool import PoolSplit, unified_arena
from lora.memory.page_writer import PageWriter, PinnedWriter
from lora.memory.pages import RankPages
from lora.memory.sharded import ShardedWriter
from lora.target_modules import BaseShape
from model.kv_cache import KVCache
from scheduler.blocks import BlockPool

_KV_SHARE = 0.5  # of the memory left after the weights, at most
_ADAPTER_SHARE = 0.25
_MAX_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The tensors of K/V and who holds its blocks, the adapters' pages, and how both share one arena, if they do."""

    cache: KVCache
    blocks: BlockPool
    pages: RankPages
    division: PoolSplit | None


def allocate_memory(config: EngineConfig, base: BaseModel, workers: WorkerPool | None) -> DeviceMemory:
    """Take the memory that `config` grants, by default shares of what is available. Raises InvalidConfig."""
    page = page_bytes(base.part.base_shape(), base.arithmetic.lora_dtype)
    kv_bytes, adapter_bytes = _kv_bytes(config, base), _adapter_bytes(config, base, page)
    stowage = _stowage(config, base, workers)
    if not _is_shared(config, base, workers):
        pages = RankPages(adapter_bytes // page, page, base.device, stowage)
        layout = base.kv_layout(config.block_size)
        cache = KVCache(layout, kv_bytes // layout.block_bytes, base.device)
        return DeviceMemory(cache, BlockPool(cache.num_blocks, cache.block_size), pages, None)
    return _shared(config, base, _divide(config, base, kv_bytes, adapter_bytes, page), page, stowage)


def _is_shared(config: EngineConfig, base: BaseModel, workers: WorkerPool | None) -> bool:
    choice = config.shared_memory
    if choice not in ("auto", "on", "off"):
        raise InvalidConfig("shared_memory", choice, "use auto, on or off")
    if choice == "on" and workers is not None:
        raise InvalidConfig("shared_memory", choice, "devices that compute together do not share: use off")
    return choice == "on" or (choice == "auto" and base.device.type == "cuda" and workers is None)


def _divide(config: EngineConfig, base: BaseModel, kv_bytes: int, adapter_bytes: int, page: int) -> PoolSplit:
    block = base.kv_layout(config.block_size).block_bytes
    needed = -(-(config.max_model_len or 1) // config.block_size)
    try:
        return PoolSplit.of(kv_bytes, adapter_bytes, block, page, needed)
    except ValueError as error:
        raise InvalidConfig("kv_cache_bytes", kv_bytes, str(error)) from error


def _shared(
    config: EngineConfig, base: BaseModel, division: PoolSplit, page: int, stowage: PageWriter | None
) -> DeviceMemory:
    layout = base.kv_layout(config.block_size)
    whole, divided = unified_arena(division, layout.block_bytes, base.device)
    cache = KVCache(layout, division.quanta * division.blocks, base.device, whole)
    held = (division.least_kv, division.most_kv)
    blocks = BlockPool(held[0] * division.blocks, config.block_size, held[1] * division.blocks)
    blocks.extend(division.kv * division.blocks)
    pages = RankPages((division.quanta - division.kv) * division.pages, page, base.device, stowage, divided)
    return DeviceMemory(cache, blocks, pages, division)


def page_bytes(base: BaseShape, dtype: torch.dtype) -> int:
    """A rank page: the largest power of two that is no larger than one rank row over all layers, so that an
    adapter wastes less than a rank; at most 2 MiB, which moves at full bandwidth."""
    row = base.num_layers * dtype.itemsize * sum(s.in_features + s.out_features for s in base.shapes)
    return min(_MAX_PAGE_BYTES, 1 << (row.bit_length() - 1))


def _adapter_bytes(config: EngineConfig, base: BaseModel, page: int) -> int:
    granted = config.adapter_bytes or int(_device_bytes(base) * _ADAPTER_SHARE)
    if granted < page:
        raise InvalidConfig("adapter_bytes", granted, f"give at least one rank page of {page} bytes")
    return granted


def _kv_bytes(config: EngineConfig, base: BaseModel) -> int:
    """As was granted; by default what all sequences could use, within a share of the memory."""
    block = base.kv_layout(config.block_size).block_bytes
    granted = config.kv_cache_bytes or int(_device_bytes(base) * _KV_SHARE)
    if config.kv_cache_bytes is None:
        length = config.max_model_len or base.config.max_model_len
        granted = min(granted, block * config.max_num_seqs * -(-length // config.block_size))
    if granted < block:
        raise InvalidConfig("kv_cache_bytes", granted, f"give at least one block of {block} bytes")
    return granted


def _stowage(config: EngineConfig, base: BaseModel, workers: WorkerPool | None) -> PageWriter | None:
    """How adapters lie in the arena, None for whole. What peers send lands in the arena itself."""
    if workers is not None:
        return ShardedWriter(base.cuts(), workers.deliver, base.device)
    return PinnedWriter(base.device) if base.device.type == "cuda" and not config.sharing.on else None


def _device_bytes(base: BaseModel) -> int:
    """What this device may take of the memory that is available; the processes of a CPU share one."""
    available = available_bytes(base.device)
    return available // base.form.shard.size if base.device.type == "cpu" else available


_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; on a CPU within its control group's limit, if any."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (_read_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _read_number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None
