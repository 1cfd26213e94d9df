"""Capture decode steps as CUDA graphs, once for each width, and replay them with nothing but new inputs."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engine.runner.base import StepSampler
from engine.runner.input_batch import InputBatch, Integers
from lora.segments import NO_SEGMENTS, SegmentTable
from lora.target_modules import SiteGroup
from model.attention.base import GraphAttention, ReservedStep
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps
from scheduler.plan import PENDING

MOST_ROWS = 256
_WARM_UPS = 2  # runs before a capture, in which kernels are compiled and libraries take their memory

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function's launches repeatable: calling the result launches them again."""

Lead = Callable[[ForwardBatch], None]
"""Has the other devices of a tensor-parallel model compute a step along, before it is computed here."""


@dataclass(frozen=True, slots=True)
class GraphParts:
    """What a decode step is computed by, each able to work from memory that never moves."""

    model: Llama
    cache: KVCache
    ops: GraphOps
    attention: GraphAttention

    @classmethod
    def of(cls, model: Llama, cache: KVCache) -> "GraphParts":
        """Take the model's own ops and attention, which must allow it: see Backends.can_capture."""
        return cls(model, cache, cast(GraphOps, model.ops), cast(GraphAttention, model.attention))


class GraphBuffers:
    """The memory, which never moves, that graphs of `width` sequences of up to `blocks` blocks each read.

    Rows beyond a step's own are computed like the others, on a spare block of the cache, and mean nothing.
    """

    def __init__(self, parts: GraphParts, width: int, blocks: int) -> None:
        """Allocate them, filled with zeros."""
        self._parts = parts
        device = parts.cache.device
        self.inputs = torch.zeros(3, width, dtype=torch.int64, device=device)  # token ids, positions, slots
        self._tables = torch.zeros(width, blocks, dtype=torch.int64, device=device)
        self._every_row = torch.arange(width, device=device)
        self._attention: ReservedStep = parts.attention.reserve(width, blocks, parts.cache)
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._loaded = NO_SEGMENTS  # what a replay that computes anew, there being no graphs, plans for

    def fill(self, inputs: Tensor, tables: Tensor) -> None:
        """Copy in a step: inputs [3, width] for every row, tables [S, widest] for those of its own."""
        self.inputs.copy_(inputs)
        count, columns = tables.shape
        self._tables[:count, :columns].copy_(tables)

    def batch(
        self, context_lens: tuple[int, ...], segments: SegmentTable, columns: int | None = None
    ) -> ForwardBatch:
        """View the step: all rows on the device, its own on the host; of the tables, `columns`."""
        token_ids, positions, slots = self.inputs
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_lens=(1,) * len(context_lens),
            context_lens=context_lens,
            block_tables=self._tables[: len(context_lens), :columns],
            logit_rows=self._every_row,
            segments=segments,
            logit_segments=_of_every_row(segments),
        )

    def launch(
        self, batch: ForwardBatch, compute: Callable[[ForwardBatch], object], capture: Capture
    ) -> None:
        """Replay the step, or capture it if it is the first of its kind, and then replay it."""
        key = self._parts.ops.load(batch)
        self._attention.refill(batch)
        self._loaded = batch.segments
        if key not in self._replays:
            self._replays[key] = capture(lambda: self._compute(compute, batch))
        self._replays[key]()

    def _compute(self, compute: Callable[[ForwardBatch], object], batch: ForwardBatch) -> None:
        compute(replace(batch, segments=self._loaded, logit_segments=_of_every_row(self._loaded)))

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute the logits [width, vocab]; part of what `compute` does."""
        return self._parts.model.forward(batch, self._parts.cache, self._attention)


def _of_every_row(segments: SegmentTable) -> SegmentTable:
    """Return the table of a step whose rows all have logits; of no rows where no adapter changes the head."""
    return segments if segments.adapts(SiteGroup.HEAD) else NO_SEGMENTS


class BuffersByWidth:
    """GraphBuffers of each width, made when they are first needed, for sequences of up to `blocks` blocks."""

    def __init__(self, parts: GraphParts, blocks: int) -> None:
        """Allocate nothing yet."""
        self._parts, self._blocks = parts, blocks
        self._by_width: dict[int, GraphBuffers] = {}

    def get(self, width: int) -> GraphBuffers:
        """Return the buffers for `width` sequences."""
        if width not in self._by_width:
            self._by_width[width] = GraphBuffers(self._parts, width, self._blocks)
        return self._by_width[width]


class CudaCapture:
    """Captures CUDA graphs, which share their memory: no two are replayed at once, and none is read after another.

    Only the capturing thread is barred from what cannot be captured: others copy adapters meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the memory and the stream that all captures use."""
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all captures: libraries keep memory for each that they meet.
        self._side = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture what `run` launches, after a few runs that are launched for good."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


def capture_for(device: torch.device) -> Capture:
    """Choose CUDA graphs, or, on a device that has none, calling the function again."""
    return CudaCapture(device) if device.type == "cuda" else lambda run: run


class CudaGraphRunner:
    """StepGraphs of 1, 2, 4, ... rows, captured when they are first needed.

    They are for up to `rows` (at most MOST_ROWS) sequences of up to `blocks` blocks each.
    """

    def __init__(
        self,
        parts: GraphParts,
        sampler: StepSampler,
        rows: int,
        blocks: int,
        capture: Capture,
        lead: Lead | None = None,
    ) -> None:
        """Draw with `sampler`; `lead` is given where the model is one device's part of several."""
        self._cache, self._sampler, self._capture, self._lead = parts.cache, sampler, capture, lead
        self._rows, self._blocks = min(rows, MOST_ROWS), blocks
        self._buffers = BuffersByWidth(parts, blocks)

    def takes(self, inputs: InputBatch) -> bool:
        """See StepGraphs."""
        fits = len(inputs.slices) <= self._rows and inputs.tables.shape[1] <= self._blocks
        return fits and inputs.decodes

    def run(self, inputs: InputBatch, segments: SegmentTable) -> None:
        """See StepGraphs."""
        buffers = self._buffers.get(1 << (len(inputs.slices) - 1).bit_length())
        self._fill(buffers, inputs)
        context_lens = tuple(inputs.context_lens.tolist())
        if self._lead is not None:
            self._insert_pending(buffers)  # the other devices draw nothing: they are sent every token
            self._lead(buffers.batch(context_lens, segments, inputs.tables.shape[1]))

        def compute(batch: ForwardBatch) -> None:
            self._insert_pending(buffers)
            self._sampler.draw(buffers.forward(batch), advance=True)

        buffers.launch(
            buffers.batch(context_lens, segments), compute, lambda run: self._capture_step(buffers, run)
        )

    def _capture_step(self, buffers: GraphBuffers, run: Callable[[], None]) -> Callable[[], None]:
        """Capture a step, and undo what capturing did.

        It runs the step to warm up, which advances the sampler's rows and draws their tokens. Both are put back,
        since the step is yet to be computed.
        """
        before = self._sampler.snapshot()
        inputs = buffers.inputs.clone()
        replay = self._capture(run)
        self._sampler.restore(before)
        buffers.inputs.copy_(inputs)
        return replay

    def _insert_pending(self, buffers: GraphBuffers) -> None:
        """Fill in pending tokens of rows that did not move: what was drawn in the same row."""
        tokens = buffers.inputs[0]
        tokens.copy_(torch.where(tokens == PENDING, self._sampler.tokens[: len(tokens)], tokens))

    def _fill(self, buffers: GraphBuffers, inputs: InputBatch) -> None:
        """Send the step's integers in one copy. Pending tokens of rows that moved are gathered here."""
        rows, width = len(inputs.slices), buffers.inputs.shape[1]
        packed = np.zeros(3 * width + inputs.tables.size, np.int64)
        by_row = packed[: 3 * width].reshape(3, -1)
        by_row[:, :rows] = inputs.token_ids, inputs.positions, inputs.slots
        by_row[2, rows:] = self._cache.spare_block * self._cache.block_size
        packed[3 * width :] = inputs.tables.ravel()
        sent = self._to_device(packed)
        buffers.fill(sent[: 3 * width].view(3, -1), sent[3 * width :].view(inputs.tables.shape))
        if len(inputs.pending) and not inputs.continues:
            rows_of, sources = self._to_device(np.stack((inputs.pending, inputs.sources)))
            buffers.inputs[0].index_copy_(0, rows_of, self._sampler.tokens.index_select(0, sources))

    def _to_device(self, values: Integers) -> Tensor:
        host = torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
        device = self._cache.device
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
