"""Assembly: a configuration becomes a working engine. The one place where the rooms are wired together."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.base_model import BaseModel, choose_base
from engine.base.heap import retain_freed_memory
from engine.build.executor_choice import make_executor
from engine.build.memory import allocate_memory
from engine.build.peers import Peers
from engine.config.config import EngineConfig
from engine.core import EngineCore
from engine.demo.embedded import adapter_folders
from engine.errors import InvalidConfig
from engine.runner.base import StepExecutor
from engine.tensor_parallel.parallel_model import ParallelModel, join, start_workers
from engine.tensor_parallel.worker_pool import WorkerPool
from engine.tokenizer import Tokenizer
from engine.unified_pool import UnifiedPool
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from lora.target_modules import BaseShape
from model.checkpoint import weights_digest
from model.config import ModelConfig
from model.llama import Llama
from scheduler.limits import StepLimits
from scheduler.request import InvalidParameter
from scheduler.residency import CheapestWindow
from scheduler.step import StepScheduler

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
    tokenizer: Tokenizer
    card: ModelCard
    changed: threading.Event  # set when an adapter became resident or failed to
    peers: Peers | None = None
    workers: WorkerPool | None = None  # the processes of the other devices

    def wait_ready(self) -> None:
        """Wait, for a bounded time, until an adapter has arrived."""
        self.changed.wait(_IDLE_S)
        self.changed.clear()

    def close(self) -> None:
        """Copy no more adapters, and end the other devices' processes. Peers are closed before."""
        self.store.close()
        if self.workers is not None:
            self.workers.close()


Around = Callable[[StepExecutor], StepExecutor]


def _bare(executor: StepExecutor) -> StepExecutor:
    return executor


def assemble(config: EngineConfig, around: Around = _bare) -> Engine:
    """Load the base model and the adapters that `config` names. `around` may put something around the executor, such
    as a measurement.

    Raises CheckpointError, UnsupportedModel, AdapterRefused or InvalidConfig, each with its remedy.
    """
    retain_freed_memory()
    base = choose_base(config)
    with ExitStack() as undo:
        workers = start_workers(base)
        if workers is not None:
            undo.callback(workers.close)
        engine = _assemble(config, around, base, workers)
        undo.pop_all()
    return engine


def _assemble(config: EngineConfig, around: Around, base: BaseModel, workers: WorkerPool | None) -> Engine:
    weights = base.load(config.progress)
    if workers is not None:
        workers.wait_loaded()
    room = allocate_memory(config, base, workers)
    cache, pages = room.cache, room.pages
    peers = Peers(config.sharing, weights_digest(base.folder), pages) if config.sharing.on else None
    store = _store(config, base.config.base_shape(), base.arithmetic.lora_dtype, pages, peers)
    limits = _limits(config, base.config, room.blocks.capacity_tokens)
    graph_blocks = _graph_blocks(config, base, limits)
    if workers is None:
        model: Llama | ParallelModel = base.build(weights, None)
    else:
        model = join(base, weights, workers, cache, pages.nbytes, graph_blocks)
    executor = make_executor(model, cache, base.arithmetic.fused, limits.most_running, graph_blocks)
    scheduler = StepScheduler(limits, room.blocks)
    memory = UnifiedPool(room.division, room.blocks, store) if room.division else None
    changed = threading.Event()
    store.on_ready(changed.set)
    core = EngineCore(scheduler, store, around(executor), time.monotonic, memory)
    _add_adapters(config, store)
    card = ModelCard(
        name=config.served_model_name or ("demo" if config.model is None else base.folder.resolve().name),
        root=config.model or str(base.folder),
        max_model_len=limits.max_model_len,
        vocab_size=base.config.vocab_size,
        eos_token_ids=base.config.eos_token_ids,
    )
    return Engine(core, store, Tokenizer.load(base.folder), card, changed, peers, workers)


def _graph_blocks(config: EngineConfig, base: BaseModel, limits: StepLimits) -> int:
    """How many blocks a sequence of a recorded step may have; 0 if none is recorded."""
    records = config.cuda_graphs and base.arithmetic.can_capture(base.config)
    return -(-limits.max_model_len // config.block_size) if records else 0


def _store(
    config: EngineConfig, base: BaseShape, dtype: torch.dtype, pages: RankPages, peers: Peers | None
) -> AdapterStore:
    """With peers, as many threads may wait for a pull as peers are asked at once, and one more may copy."""
    disk = DiskTier(config.adapter_cache_dir) if config.adapter_cache_dir else None
    residency = Residency(pages, CheapestWindow())
    if peers is None:
        return AdapterStore(base, dtype, residency, disk)
    workers = min(_MOST_WORKERS, 1 + config.sharing.pulls * len(config.sharing.peers))
    return AdapterStore(base, dtype, residency, disk, workers, peers.peering)


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


def _add_adapters(config: EngineConfig, store: AdapterStore) -> None:
    """The embedded model brings its own adapters; a name given explicitly wins over one that was found.

    All names are known before the first weights are read: peers ask from the start on.
    """
    embedded = adapter_folders().items() if config.model is None else ()
    for name, folder in (*embedded, *_found(config.lora_dir), *config.loras):
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
