"""Capture decode steps as CUDA graphs, once for each width, and replay them with nothing but new inputs.

GraphBuffers are the memory that the graphs of one width read, which never moves.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.runner.base import DeviceSampler
from engine.runner.input_batch import InputBatch
from lora.segments import NO_SEGMENTS, SegmentTable
from model.attention.base import GraphAttention, ReservedStep
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps
from scheduler.plan import PENDING

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function's launches repeatable: calling the result launches them again."""


@dataclass(frozen=True, slots=True)
class GraphParts:
    """What a decode step is computed by, each able to work from memory that never moves."""

    model: Llama
    cache: KVCache
    ops: GraphOps
    attention: GraphAttention


class GraphBuffers:
    """Steps of up to `width` sequences of up to `blocks` blocks each. Rows beyond a step's own go through the motions
    on a spare block of the cache."""

    def __init__(self, parts: GraphParts, width: int, blocks: int) -> None:
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


MOST_ROWS = 256
Lead = Callable[[ForwardBatch], None]
"""Has the other devices of a group compute a step along, before it is computed here."""

_WARM_UPS = 2  # runs before a recording, in which kernels are compiled and libraries take their memory


class CudaCapture:
    """Records CUDA graphs, which share their memory: no two are replayed at once, and none is read after another.

    Only the recording thread is barred from what cannot be recorded: others copy adapters meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all recordings: libraries keep memory for each that they meet.
        self._side = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """A graph of what `run` launches, after a few runs that are launched for good."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


def capture_for(device: torch.device) -> Record:
    """CUDA graphs; on a device that has none, calling the function again."""
    return CudaCapture(device) if device.type == "cuda" else lambda run: run


class CudaGraphRunner:
    """Graphs of 1, 2, 4, ... rows, up to `rows` (at most MOST_ROWS) sequences of up to `blocks` blocks each, recorded
    when they are first needed. `lead` is given where the model is one device's part of several."""

    def __init__(
        self,
        parts: GraphParts,
        sampler: DeviceSampler,
        rows: int,
        blocks: int,
        record: Record,
        lead: Lead | None = None,
    ) -> None:
        self._parts, self._sampler, self._record, self._lead = parts, sampler, record, lead
        self._rows, self._blocks = min(rows, MOST_ROWS), blocks
        self._lanes: dict[int, GraphBuffers] = {}

    def takes(self, layout: InputBatch) -> bool:
        """Whether a graph computes the layout's step."""
        fits = len(layout.slices) <= self._rows and layout.tables.shape[1] <= self._blocks
        return fits and layout.decodes

    def run(self, layout: InputBatch, table: SegmentTable) -> None:
        """Launch a step that `takes` takes: its tokens are drawn into the sampler's first rows."""
        width = 1 << (len(layout.slices) - 1).bit_length()
        if width not in self._lanes:
            self._lanes[width] = GraphBuffers(self._parts, width, self._blocks)
        lane = self._lanes[width]
        self._fill(lane, layout)
        context_lens = tuple(layout.context_lens.tolist())
        if self._lead is not None:
            self._look_up(lane)  # the other devices draw nothing: they are sent every token
            self._lead(lane.batch(context_lens, table, layout.tables.shape[1]))

        def compute(batch: ForwardBatch) -> None:
            self._look_up(lane)
            self._sampler.draw(lane.forward(batch), advance=True)

        lane.launch(lane.batch(context_lens, table), compute, lambda run: self._recorded(lane, run))

    def _recorded(self, lane: GraphBuffers, run: Callable[[], None]) -> Callable[[], None]:
        """Recording runs the step to warm up, which advances the sampler's rows and draws their tokens: both are put
        back, since the step is yet to be computed."""
        before = self._sampler.snapshot()
        inputs = lane.inputs.clone()
        replay = self._record(run)
        self._sampler.restore(before)
        lane.inputs.copy_(inputs)
        return replay

    def _look_up(self, lane: GraphBuffers) -> None:
        """Pending tokens of rows that did not move: what was drawn in the same row."""
        tokens = lane.inputs[0]
        tokens.copy_(torch.where(tokens == PENDING, self._sampler.tokens[: len(tokens)], tokens))

    def _fill(self, lane: GraphBuffers, layout: InputBatch) -> None:
        """Send the step's integers. Pending tokens of rows that moved are gathered here."""
        rows, (count, columns) = len(layout.slices), layout.tables.shape
        width = lane.inputs.shape[1]
        sent = np.zeros(3 * width + layout.tables.size, np.int64)
        inputs, tables = sent[: 3 * width].reshape(3, -1), sent[3 * width :]
        inputs[:, :rows] = layout.token_ids, layout.positions, layout.slots
        inputs[2, rows:] = self._parts.cache.spare_block * self._parts.cache.block_size
        tables[:] = layout.tables.ravel()
        on_device = self._sent(sent)
        lane.inputs.copy_(on_device[: inputs.size].view(3, -1))
        lane.tables[:count, :columns].copy_(on_device[inputs.size :].view(count, columns))
        if len(layout.pending) and not layout.continues:
            moved = self._sent(np.stack((layout.pending, layout.sources)))
            lane.inputs[0].index_copy_(0, moved[0], self._sampler.tokens.index_select(0, moved[1]))

    def _sent(self, values: np.ndarray) -> Tensor:
        host = torch.from_numpy(values)
        device = self._parts.cache.device
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
