"""Lane: the graphs of decode steps of one width, and the memory that they read, which never moves."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora.segments import NO_SEGMENTS, SegmentTable
from model.attention.base import GraphAttention, ReservedStep
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function's launches repeatable: calling the result launches them again."""


@dataclass(frozen=True, slots=True)
class DecodeParts:
    """What a decode step is computed by, each able to work from memory that never moves."""

    model: Llama
    cache: KVCache
    ops: GraphOps
    attention: GraphAttention


class Lane:
    """Steps of up to `width` sequences of up to `blocks` blocks each. Rows beyond a step's own go through the motions
    on a spare block of the cache."""

    def __init__(self, parts: DecodeParts, width: int, blocks: int) -> None:
        self._parts = parts
        device = parts.cache.device
        self.inputs = torch.zeros(3, width, dtype=torch.int64, device=device)
        self.tables = torch.zeros(width, blocks, dtype=torch.int64, device=device)
        self._every_row = torch.arange(width, device=device)
        self._attention: ReservedStep = parts.attention.reserve(width, blocks, parts.cache)
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._loaded = NO_SEGMENTS  # what a replay that computes anew, there being no graphs, plans for

    def batch(
        self, context_lens: tuple[int, ...], segments: SegmentTable, columns: int | None = None
    ) -> ForwardBatch:
        """The step that lies in the memory: all rows on the device, its own on the host; of the tables, `columns`."""
        token_ids, positions, slots = self.inputs
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_lens=(1,) * len(context_lens),
            context_lens=context_lens,
            block_tables=self.tables[: len(context_lens), :columns],
            logit_rows=self._every_row,
            segments=segments,
        )

    def launch(self, batch: ForwardBatch, compute: Callable[[ForwardBatch], None], record: Record) -> None:
        """Compute the step that lies in the memory: replayed, or the first of its kind recorded and then replayed."""
        key = self._parts.ops.load(batch)
        self._attention.refill(batch)
        self._loaded = batch.segments
        if key not in self._replays:
            self._replays[key] = record(lambda: compute(replace(batch, segments=self._loaded)))
        self._replays[key]()

    def forward(self, batch: ForwardBatch) -> Tensor:
        """[width, vocab], the logits; what `compute` computes."""
        return self._parts.model.forward(batch, self._parts.cache, self._attention)
