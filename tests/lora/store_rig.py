"""A store over a small arena, with adapters to put there."""

from pathlib import Path

import torch

from lora.adapter import AdapterRef
from lora.memory.pages import RankPages
from lora.memory.residency import Residency
from lora.sources.source_folders import NOTHING_FETCHED, SourceOptions
from lora.store.store import AdapterStore
from lora.store.tiers import DiskTier
from scheduler.residency import CheapestWindow
from tests.lora.executors import InlineExecutor
from tests.oracles.adapters import base_shape, write_adapter

BASE_SHAPE = base_shape()
PAGE_BYTES = 4096
PAGES_OF_RANK_4 = 6  # 3 layers, all sites, float32: 21.75 KiB


class StoreRig:
    """A store over a small arena with numbered adapters of rank 4, and how to bring them in."""

    def __init__(
        self,
        root: Path,
        adapters_that_fit: int,
        *,
        disk: bool = True,
        dtype: torch.dtype = torch.float32,
        sources: SourceOptions = NOTHING_FETCHED,
    ) -> None:
        self.root = root
        self.pages = RankPages(adapters_that_fit * PAGES_OF_RANK_4, PAGE_BYTES)
        self.executor = InlineExecutor()
        tier = DiskTier(root / "cache") if disk else None
        residency = Residency(self.pages, CheapestWindow())
        self.store = AdapterStore(BASE_SHAPE, dtype, residency, tier, self.executor, sources=sources)

    def folder(self, seed: int, rank: int = 4) -> Path:
        """A PEFT folder with content of its own for each seed."""
        return write_adapter(self.root / f"adapter-{seed}", BASE_SHAPE, rank, seed)

    def load(self, seed: int, name: str | None = None) -> AdapterRef:
        return self.store.registry.load(name or f"a{seed}", self.folder(seed))

    def step(self, *refs: AdapterRef) -> None:
        """One step that runs these adapters."""
        assert {ref.digest for ref in refs} <= self.store.ready()
        self.store.acquire(refs).release()


def first_weight(store: AdapterStore, ref: AdapterRef) -> torch.Tensor:
    """A copy of the first matrix of a resident adapter."""
    assert ref.digest in store.ready()
    with store.acquire((ref,)) as lease:
        return next(iter(lease.weights[ref.digest].groups.values())).A.clone()
