"""An engine whose model is a fake and whose scheduler, store and text are real."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.assembly.assembly import Engine
from engine.assembly.tokenizer_loading import load_tokenizer
from engine.base.model_card import ModelCard
from engine.core import EngineCore
from engine.structured.grammar_cache import GrammarCache
from lora.daemon_threads import DeadlineCalls
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.sources.source_folders import NOTHING_FETCHED, SourceOptions
from lora.store.store import AdapterStore, StoreThreads
from lora.store.tiers import DiskTier
from scheduler.blocks import BlockPool
from scheduler.limits import StepLimits
from scheduler.residency import CheapestWindow
from scheduler.step import StepScheduler
from tests.fakes.executor import FakeExecutor
from tests.oracles.adapters import base_shape, write_adapter
from tests.oracles.tokenizer import write_tokenizer

NUM_BLOCKS, BLOCK_SIZE = 64, 4
VOCAB_SIZE = 260
RANKS = {"low": 8, "high": 24}
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Rig:
    """The engine, its fake executor, and the PEFT folders of adapters that are registered (`low`, `high`)."""

    engine: Engine
    executor: FakeExecutor
    folders: dict[str, Path]


def build(
    folder: Path,
    adapter_pages: int = 512,
    cache: Path | None = None,
    *,
    lags: bool = False,
    vocab_size: int = VOCAB_SIZE,
    read_timeout_s: float = 60.0,
    sources: SourceOptions = NOTHING_FETCHED,
) -> Rig:
    """A rig whose files live in `folder`, with packed adapters kept in `cache`."""
    write_tokenizer(folder)
    base = base_shape()
    residency = Residency(RankPages(adapter_pages, PAGE_BYTES), CheapestWindow())
    threads = StoreThreads(files=DeadlineCalls(read_timeout_s))
    disk = DiskTier(cache) if cache else None
    store = AdapterStore(base, torch.float32, residency, disk, threads, sources=sources)
    folders = {name: write_adapter(folder / name, base, rank, seed=rank) for name, rank in RANKS.items()}
    store.registry.reserve(("base",))
    for name, path in folders.items():
        store.registry.declare(name, path)
    limits = StepLimits(8, 32, 128, adapter_patience_s=0.0)
    scheduler = StepScheduler(limits, BlockPool(NUM_BLOCKS, BLOCK_SIZE))
    executor = FakeExecutor(lags=lags)
    core = EngineCore(scheduler, store, executor, time.monotonic, vocab_size)
    changed = threading.Event()
    store.loader.on_ready(changed.set)
    card = ModelCard(("base",), str(folder), 128, vocab_size, (2,))
    tokenizer = load_tokenizer(folder)
    grammars = GrammarCache(lambda: tokenizer.table(vocab_size))
    return Rig(Engine(core, store, tokenizer, card, changed, grammars), executor, folders)


def is_clean(engine: Engine) -> bool:
    """True if nothing of any request is left: no sequence, no block in use, no adapter retained."""
    live, blocks = engine.core.live(), engine.core.block_stats()
    return live.running == live.waiting == blocks.used == 0 and engine.core.num_live_requests == 0
