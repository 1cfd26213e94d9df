"""DecodeGraphs: steps of one row per sequence, recorded once for each width and replayed with nothing but new inputs.

A replay reads its tokens, positions, slots and block tables from memory that never moves, and leaves the drawn tokens
in the sampler's. Rows beyond the step's own go through the motions on a spare block of the cache.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.draws import DeviceSampler
from engine.layout import Layout
from lora.segments import SegmentTable
from model.attention.base import GraphAttention, ReservedStep
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps
from scheduler.plan import PENDING

MOST_ROWS = 256
_WARM_UPS = 2  # runs before a recording, in which kernels are compiled and libraries take their memory

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function's launches repeatable: calling the result launches them again."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory: no two are replayed at once, and none is read after another.

    Only the recording thread is barred from what cannot be recorded: others copy adapters meanwhile.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """A graph of what `run` launches, after a few runs that are launched for good."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


@dataclass(frozen=True, slots=True)
class DecodeParts:
    """What a decode step is made of, each able to work from memory that never moves."""

    model: Llama
    cache: KVCache
    ops: GraphOps
    attention: GraphAttention
    sampler: DeviceSampler


class DecodeGraphs:
    """Graphs of 1, 2, 4, ... rows, up to `rows` (at most MOST_ROWS) sequences of up to `blocks` blocks each, recorded
    when they are first needed."""

    def __init__(self, parts: DecodeParts, rows: int, blocks: int, record: Record) -> None:
        self._parts, self._record = parts, record
        self._rows, self._blocks = min(rows, MOST_ROWS), blocks
        self._lanes: dict[int, _Lane] = {}

    def takes(self, layout: Layout) -> bool:
        """Whether a graph computes the layout's step."""
        fits = len(layout.slices) <= self._rows and layout.tables.shape[1] <= self._blocks
        return fits and layout.decodes

    def run(self, layout: Layout, table: SegmentTable) -> None:
        """Launch a step that `takes` takes: its tokens are drawn into the sampler's first rows."""
        width = 1 << (len(layout.slices) - 1).bit_length()
        if width not in self._lanes:
            self._lanes[width] = _Lane(self._parts, width, self._blocks, self._record)
        self._lanes[width].run(layout, table)


class _Lane:
    """The graphs of one width, and the memory that they read."""

    def __init__(self, parts: DecodeParts, width: int, blocks: int, record: Record) -> None:
        self._parts, self._width, self._record = parts, width, record
        device = parts.cache.device
        self._inputs = torch.zeros(3, width, dtype=torch.int64, device=device)
        self._tables = torch.zeros(width, blocks, dtype=torch.int64, device=device)
        self._every_row = torch.arange(width, device=device)
        self._attention: ReservedStep = parts.attention.reserve(width, blocks, parts.cache)
        self._replays: dict[Hashable, Callable[[], None]] = {}

    def run(self, layout: Layout, table: SegmentTable) -> None:
        """Fill the memory, then replay; the first step of its kind is computed by being recorded."""
        self._fill(layout)
        batch = self._batch(layout, table)
        key = self._parts.ops.load(batch)
        self._attention.refill(batch)
        if key not in self._replays:
            self._replays[key] = self._recorded(batch)
        self._replays[key]()

    def _recorded(self, batch: ForwardBatch) -> Callable[[], None]:
        """Recording runs the step to warm up, which advances the sampler's rows and draws their tokens: both are put
        back, since the step is yet to be computed."""
        sampler = self._parts.sampler
        before = sampler.snapshot()
        inputs = self._inputs.clone()
        replay = self._record(lambda: self._compute(batch))
        sampler.restore(before)
        self._inputs.copy_(inputs)
        return replay

    def _compute(self, batch: ForwardBatch) -> None:
        parts = self._parts
        tokens = self._inputs[0]
        tokens.copy_(torch.where(tokens == PENDING, parts.sampler.tokens[: self._width], tokens))
        logits = parts.model.forward(batch, parts.cache, self._attention)
        parts.sampler.draw(logits, advance=True)

    def _batch(self, layout: Layout, table: SegmentTable) -> ForwardBatch:
        """The step as its graph computes it: `width` rows on the device, the layout's own on the host."""
        token_ids, positions, slots = self._inputs
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_lens=tuple(layout.query_lens.tolist()),
            context_lens=tuple(layout.context_lens.tolist()),
            block_tables=self._tables[: len(layout.slices)],
            logit_rows=self._every_row,
            segments=table,
        )

    def _fill(self, layout: Layout) -> None:
        """Send the step's integers. Pending tokens of rows that moved are gathered here; of rows that did not, the
        graph itself reads what was drawn in the same row."""
        rows, (count, columns) = len(layout.slices), layout.tables.shape
        spare = self._parts.cache.spare_block * self._parts.cache.block_size
        sent = np.zeros(3 * self._width + layout.tables.size, np.int64)
        inputs, tables = sent[: 3 * self._width].reshape(3, -1), sent[3 * self._width :]
        inputs[:, :rows] = layout.token_ids, layout.positions, layout.slots
        inputs[2, rows:] = spare
        tables[:] = layout.tables.ravel()
        on_device = self._sent(sent)
        self._inputs.copy_(on_device[: inputs.size].view(3, -1))
        self._tables[:count, :columns].copy_(on_device[inputs.size :].view(count, columns))
        if len(layout.pending) and not layout.continues:
            moved = self._sent(np.stack((layout.pending, layout.sources)))
            self._inputs[0].index_copy_(0, moved[0], self._parts.sampler.tokens.index_select(0, moved[1]))

    def _sent(self, values: np.ndarray) -> Tensor:
        host = torch.from_numpy(values)
        device = self._parts.cache.device
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
