"""Assembly: a configuration becomes a working engine. The one place where the rooms are wired together."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.core import EngineCore, StepExecutor
from engine.demo.paths import DEMO_ADAPTERS, DEMO_BASE
from engine.errors import InvalidConfig
from engine.executor import Executor
from engine.memory import available_bytes
from engine.peers import Peers
from engine.text import TextCodec
from lora.ops.grouped import GroupedLora
from lora.pool import RankPages
from lora.sites import BaseShape
from lora.store import AdapterStore
from lora.tiers import DiskTier
from model.attention.torch_paged import TorchPagedAttention
from model.checkpoint import (
    find_checkpoint,
    load_weights,
    read_config,
    serving_dtype,
    weights_digest,
)
from model.config import ModelConfig
from model.heap import retain_freed_memory
from model.kv_cache import KVCache, KVLayout
from model.llama import Llama
from model.ops.eager import EagerOps
from scheduler.blocks import BlockPool
from scheduler.request import InvalidParameter
from scheduler.step import StepLimits, StepScheduler

_KV_SHARE = 0.5  # of the memory left after the weights, at most
_ADAPTER_SHARE = 0.25
_MAX_PAGE_BYTES = 2 << 20
_IDLE_S = 0.5
_MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is told of the base model."""

    name: str
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def check_token_ids(self, token_ids: tuple[int, ...]) -> None:
        """Raise InvalidParameter for an id that the model has no embedding for."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidParameter("prompt", token_id, f"give token ids from 0 to {self.vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class Engine:
    """A core with what its doors need beside it."""

    core: EngineCore
    store: AdapterStore
    codec: TextCodec
    card: ModelCard
    changed: threading.Event  # set when an adapter became resident or failed to
    peers: Peers | None = None

    def wait_ready(self) -> None:
        """Wait, for a bounded time, until an adapter has arrived."""
        self.changed.wait(_IDLE_S)
        self.changed.clear()


Around = Callable[[StepExecutor], StepExecutor]


def _bare(executor: StepExecutor) -> StepExecutor:
    return executor


def assemble(config: EngineConfig, around: Around = _bare) -> Engine:
    """Load the base model and the adapters that `config` names. `around` may put something around the executor, such
    as a measurement.

    Raises CheckpointError, UnsupportedModel, AdapterRefused or InvalidConfig, each with its remedy.
    """
    retain_freed_memory()
    device = _device(config.device)
    folder = DEMO_BASE if config.model is None else find_checkpoint(config.model)
    model_config = read_config(folder)
    dtype = serving_dtype(model_config, config.dtype, device)
    weights = load_weights(folder, model_config, dtype, device, config.progress)
    ops = EagerOps(model_config, dtype, device, GroupedLora())
    model = Llama(model_config, weights, TorchPagedAttention(model_config), ops)
    base, lora_dtype = model_config.base_shape(), _lora_dtype(config.lora_dtype, dtype, device)
    pages = _pages(config, base, lora_dtype, device)
    peers = Peers(config.sharing, weights_digest(folder), pages) if config.sharing.on else None
    store = _store(config, base, lora_dtype, pages, peers)
    cache = _cache(config, model_config, dtype, device)
    blocks = BlockPool(cache.num_blocks, cache.block_size)
    limits = _limits(config, model_config, blocks.capacity_tokens)
    scheduler = StepScheduler(limits, blocks)
    changed = threading.Event()
    store.on_ready(changed.set)
    core = EngineCore(scheduler, store, around(Executor(model, cache)), time.monotonic)
    _add_adapters(config, store)
    card = ModelCard(
        name=config.served_model_name or ("demo" if config.model is None else folder.resolve().name),
        root=config.model or str(folder),
        max_model_len=limits.max_model_len,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )
    return Engine(core, store, TextCodec.load(folder), card, changed, peers)


def page_bytes(base: BaseShape, dtype: torch.dtype) -> int:
    """A rank page: the largest power of two that is no larger than one rank row over all layers, so that an
    adapter wastes less than a rank; at most 2 MiB, which moves at full bandwidth."""
    row = base.num_layers * dtype.itemsize * sum(s.in_features + s.out_features for s in base.shapes)
    return min(_MAX_PAGE_BYTES, 1 << (row.bit_length() - 1))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("device", name, "torch sees no CUDA device here: use cpu or auto")
    if name not in ("cpu", "cuda"):
        raise InvalidConfig("device", name, "use auto, cpu or cuda")
    return torch.device(name)


def _lora_dtype(name: str, model: torch.dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else model
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in named:
        raise InvalidConfig("lora_dtype", name, f"use auto, {' or '.join(named)}")
    return named[name]


def _pages(config: EngineConfig, base: BaseShape, dtype: torch.dtype, device: torch.device) -> RankPages:
    granted = config.adapter_bytes or int(available_bytes(device) * _ADAPTER_SHARE)
    size = page_bytes(base, dtype)
    if granted < size:
        raise InvalidConfig("adapter_bytes", granted, f"give at least one rank page of {size} bytes")
    return RankPages(granted // size, size, device)


def _store(
    config: EngineConfig, base: BaseShape, dtype: torch.dtype, pages: RankPages, peers: Peers | None
) -> AdapterStore:
    """With peers, as many threads may wait for a pull as peers are asked at once, and one more may copy."""
    disk = DiskTier(config.adapter_cache_dir) if config.adapter_cache_dir else None
    if peers is None:
        return AdapterStore(base, dtype, pages, disk)
    workers = min(_MOST_WORKERS, 1 + config.sharing.pulls * len(config.sharing.peers))
    return AdapterStore(base, dtype, pages, disk, workers, peers.peering)


def _limits(config: EngineConfig, model: ModelConfig, capacity_tokens: int) -> StepLimits:
    """The longest sequence is what was asked for, else the model's length or what all K/V blocks hold."""
    length = config.max_model_len or min(model.max_model_len, capacity_tokens)
    if length > model.max_model_len:
        raise InvalidConfig("max_model_len", length, f"the model's positions end at {model.max_model_len}")
    if length > capacity_tokens:
        raise InvalidConfig(
            "max_model_len", length, f"the K/V cache holds {capacity_tokens} tokens: enlarge it"
        )
    return StepLimits(config.max_num_seqs, config.max_num_batched_tokens, length, config.adapter_patience_s)


def _cache(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> KVCache:
    """As many blocks as were granted; by default what all sequences could use, within a share of the memory."""
    layout = KVLayout.of(model, dtype, config.block_size)
    granted = config.kv_cache_bytes or int(available_bytes(device) * _KV_SHARE)
    num_blocks = granted // layout.block_bytes
    if config.kv_cache_bytes is None:
        length = config.max_model_len or model.max_model_len
        num_blocks = min(num_blocks, config.max_num_seqs * -(-length // config.block_size))
    if num_blocks < 1:
        raise InvalidConfig(
            "kv_cache_bytes", granted, f"give at least one block of {layout.block_bytes} bytes"
        )
    return KVCache(layout, num_blocks, device)


def _add_adapters(config: EngineConfig, store: AdapterStore) -> None:
    """The embedded model brings its own adapters; a name given explicitly wins over one that was found."""
    found = _found(DEMO_ADAPTERS) if config.model is None else []
    for name, folder in found + _found(config.lora_dir):
        store.declare(name, folder)
    for name, folder in config.loras:
        store.load(name, folder)


def _found(lora_dir: Path | None) -> list[tuple[str, Path]]:
    """Every PEFT folder directly below `lora_dir`, by its name."""
    if lora_dir is None:
        return []
    if not lora_dir.is_dir():
        raise InvalidConfig("lora_dir", str(lora_dir), "it is not a folder: give one that holds PEFT folders")
    folders = sorted(path.parent for path in lora_dir.glob("*/adapter_config.json"))
    return [(folder.name, folder) for folder in folders]
