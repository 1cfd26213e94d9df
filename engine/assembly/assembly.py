"""Assemble an engine from its configuration: the one place where the parts are wired together.

It knows every part but what serves requests. Below it stand the runner and tensor_parallel, and these stand on base:
none of them may know who assembles them.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.assembly.executor_choice import make_executor
from engine.assembly.first_adapters import add_adapters
from engine.assembly.memory import DeviceMemory, allocate_memory
from engine.assembly.peers import Peers
from engine.assembly.self_test import SelfTest
from engine.assembly.tokenizer_loading import load_tokenizer
from engine.base.base_model import BaseModel, choose_base
from engine.base.machine_memory import retain_freed_memory
from engine.base.model_card import ModelCard, base_names, model_card
from engine.config.config import EngineConfig
from engine.config.option_types import operator_source
from engine.core import EngineCore
from engine.demo.embedded import adapter_folders
from engine.errors import InvalidConfig
from engine.runner.base import StepExecutor
from engine.structured.grammar_cache import GrammarCache
from engine.tensor_parallel.parallel_model import ParallelModel, join, start_workers
from engine.tensor_parallel.worker_pool import WorkerPool
from engine.tokenizer import Tokenizer
from lora.daemon_threads import DeadlineCalls
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.store.folder_watch import FolderWatch
from lora.store.store import AdapterStore, StoreThreads
from lora.store.tiers import DiskTier
from lora.target_modules import BaseShape
from model.checkpoint_files import weights_digest
from model.config import ModelConfig
from model.llama import Llama
from scheduler.limits import StepLimits
from scheduler.residency import CheapestWindow
from scheduler.step import StepScheduler
from scheduler.tenant_turns import TenantTurns
from scheduler.unified_pool import UnifiedPool

_IDLE_S = 0.5
_MOST_LOADER_THREADS = 8
_LEAST_LEN = 2  # tokens: one of a prompt and one of its answer


@dataclass(frozen=True, slots=True)
class Engine:
    """A core with what those who serve requests need beside it."""

    core: EngineCore
    store: AdapterStore
    tokenizer: Tokenizer
    card: ModelCard
    changed: threading.Event  # set when an adapter became resident or failed to
    grammars: GrammarCache
    peers: Peers | None = None
    workers: WorkerPool | None = None  # the processes of the other devices
    watch: FolderWatch | None = None  # over the folder of adapters
    turns: TenantTurns = field(default_factory=TenantTurns)  # of those whose requests wait

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """Return the tokenizer of the base model or an adapter, with the chat template and end tokens that it has.

        It may read files and ask peers. Raises what AdapterRegistry.resolve raises.
        """
        if name is None or name in self.card.names:
            return self.tokenizer
        return self.tokenizer.of_adapter(self.store.registry.companions(name))

    def end_tokens_of(self, name: str | None) -> tuple[int, ...]:
        """Return the tokens that end an answer of the base model or an adapter. Raises as `tokenizer_of`."""
        return tuple(dict.fromkeys((*self.card.eos_token_ids, *self.tokenizer_of(name).eos_token_ids)))

    def wait_ready(self) -> None:
        """Wait, for a bounded time, until an adapter has arrived."""
        self.changed.wait(_IDLE_S)
        self.changed.clear()

    def close(self) -> None:
        """Copy no more adapters, and end the other devices' processes. Peers are closed before."""
        if self.watch is not None:
            self.watch.close()
        self.store.close()
        self.tokenizer.close()
        self.grammars.close()
        if self.workers is not None:
            self.workers.close()


ExecutorWrapper = Callable[[StepExecutor], StepExecutor]


def _unwrapped(executor: StepExecutor) -> StepExecutor:
    return executor


def assemble(config: EngineConfig, wrap: ExecutorWrapper = _unwrapped) -> Engine:
    """Load the base model and the adapters that `config` names. `wrap` may put a measurement around the executor.

    Raises CheckpointError, UnsupportedModel, AdapterRefused or InvalidConfig, each with its remedy.
    """
    retain_freed_memory()
    base_names(config)  # before the model is loaded, which takes long
    base = choose_base(config)
    with ExitStack() as undo:
        workers = start_workers(base)
        if workers is not None:
            undo.callback(workers.close)
        engine = _assemble(config, wrap, base, workers, undo)
        undo.pop_all()
    return engine


def _assemble(
    config: EngineConfig, wrap: ExecutorWrapper, base: BaseModel, workers: WorkerPool | None, undo: ExitStack
) -> Engine:
    tokenizer = load_tokenizer(base.folder, config.chat_template, config.tool_call_parser)
    undo.callback(tokenizer.close)
    weights = base.load(config.progress)
    if workers is not None:
        workers.wait_loaded()
    memory = allocate_memory(config, base, workers)
    limits = _limits(config, base.config, memory.blocks.capacity_tokens)
    graph_blocks = _graph_blocks(config, base, limits)
    peers = None
    if config.peers.enabled:
        peers = Peers(config.peers, weights_digest(base.folder), memory.pages)
    if workers is None:
        model: Llama | ParallelModel = base.build(weights, None)
    else:
        model = join(base, weights, workers, memory.cache, memory.pages.nbytes, graph_blocks)
    executor = make_executor(
        model, memory.cache, base.backends.uses_triton, limits.most_running, graph_blocks
    )
    store = _store(config, base.config.base_shape(), base.backends.lora_dtype, memory.pages, peers)
    undo.callback(store.close)
    changed = threading.Event()
    store.loader.on_ready(changed.set)
    turns = TenantTurns()
    core = _core(wrap(executor), memory, limits, store, base.config.vocab_size, turns)
    core.logprobs_mode = config.logprobs_mode
    longest, ends = limits.max_model_len, tokenizer.eos_token_ids
    card = model_card(config, base.config, base.folder, longest, ends)
    store.check_companions(tokenizer.check_adapter)
    if config.self_test:
        test = SelfTest(core, changed, card.vocab_size, card.max_model_len)
        test.check_base()
        store.try_contents(test)
    watch = _add_adapters(config, store, card)
    grammars = GrammarCache(lambda: tokenizer.table(card.vocab_size))
    return Engine(core, store, tokenizer, card, changed, grammars, peers, workers, watch, turns)


def _limits(config: EngineConfig, model: ModelConfig, capacity_tokens: int) -> StepLimits:
    """Return a step's limits. The longest sequence is what was asked for, else what model and K/V blocks allow."""
    length = config.max_model_len or min(model.max_model_len, capacity_tokens)
    if length > model.max_model_len:
        raise InvalidConfig("max_model_len", length, f"the model's positions end at {model.max_model_len}")
    if length > capacity_tokens:
        raise InvalidConfig(
            "max_model_len", length, f"the K/V cache holds {capacity_tokens} tokens: enlarge it"
        )
    if length < _LEAST_LEN:
        raise InvalidConfig(
            "kv_cache_bytes", config.kv_cache_bytes, f"it holds {capacity_tokens} tokens: enlarge it"
        )
    dynamic = model.rope.original_max_tokens if model.rope.kind == "dynamic" else None
    return StepLimits(
        config.max_num_seqs, config.max_num_batched_tokens, length, config.adapter_patience_s, dynamic
    )


def _graph_blocks(config: EngineConfig, base: BaseModel, limits: StepLimits) -> int:
    """Return how many blocks a sequence of a captured step may have; 0 if none is captured."""
    captures = config.cuda_graphs and base.backends.can_capture(base.config)
    return -(-limits.max_model_len // config.block_size) if captures else 0


def _store(
    config: EngineConfig, base: BaseShape, dtype: torch.dtype, pages: RankPages, peers: Peers | None
) -> AdapterStore:
    """Make the store. With peers, as many threads may wait for a pull as peers are asked at once, and one may copy."""
    files = DeadlineCalls(config.adapter_read_timeout_s)
    disk = (
        _disk_tier(config.adapter_cache_dir, config.adapter_cache_bytes, files)
        if config.adapter_cache_dir
        else None
    )
    residency = Residency(pages, CheapestWindow())
    sources = config.sources.options(config.adapter_cache_dir, (config.loras or {}).values())
    if peers is None:
        return AdapterStore(base, dtype, residency, disk, StoreThreads(1, files), sources=sources)
    members = len(config.peers.addresses) or _MOST_LOADER_THREADS  # a coordinator tells them later
    threads = min(_MOST_LOADER_THREADS, 1 + config.peers.pulls * members)
    return AdapterStore(base, dtype, residency, disk, StoreThreads(threads, files), peers.peering, sources)


def _disk_tier(folder: Path, most_bytes: int | None, files: DeadlineCalls) -> DiskTier:
    try:
        return DiskTier(folder, most_bytes, files)
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        told = error.strerror if isinstance(error, OSError) else error
        remedy = f"the folder cannot be used ({told}): give another one"
        raise InvalidConfig("adapter_cache_dir", str(folder), remedy) from error


def _core(
    executor: StepExecutor, memory: DeviceMemory, limits: StepLimits, store: AdapterStore, vocab_size: int,
    turns: TenantTurns,
) -> EngineCore:  # fmt: skip
    pool = UnifiedPool(memory.split, memory.blocks, store.contents) if memory.split else None
    scheduler = StepScheduler(limits, memory.blocks, turns)
    return EngineCore(scheduler, store, executor, time.monotonic, vocab_size, pool)


def _add_adapters(config: EngineConfig, store: AdapterStore, card: ModelCard) -> FolderWatch | None:
    """Let the store know the configuration's adapters; the embedded model brings its own."""
    store.registry.reserve(card.names)
    named = {name: operator_source(folder) for name, folder in (config.loras or {}).items()}
    embedded = adapter_folders() if config.model is None else {}
    watch = add_adapters(store.registry, named, config.lora_dir, embedded)
    if watch is not None and config.lora_dir_poll_s:
        watch.start(config.lora_dir_poll_s)
    return watch
