"""AsyncExecutor: steps on an accelerator that the host does not wait for.

A launch sends the step's integers down in one copy from pinned memory, starts the kernels and returns; tokens that the
step before draws are read where they are drawn, on the device. Steps of one row per sequence are replayed as graphs. A
step that asks for log-probabilities is read back before its launch returns, as on a CPU.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.runner.base import DeviceSampler, Fetched, StepOutputs
from engine.runner.executor import Computed, segments
from engine.runner.input_batch import InputBatch, InputBatchBuilder, Integers
from engine.runner.sampling_io import draw, sample_row
from lora.segments import NO_SEGMENTS, AdapterLease, SegmentTable
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Model
from model.sampling.sample import SampleRow
from scheduler.plan import SliceOutput, StepPlan


@dataclass(frozen=True, slots=True)
class Drawing:
    """A launched plan whose tokens are on their way to the host."""

    layout: InputBatch
    fetched: Fetched

    @property
    def done(self) -> bool:
        """See Computation."""
        return self.fetched.done

    def outputs(self) -> StepOutputs:
        """See Computation."""
        tokens, unsound = self.fetched.tokens()
        slices, draws, places = self.layout.slices, self.layout.draws, self.layout.places.tolist()
        outputs = [SliceOutput(None)] * len(slices)
        for i, token_id in zip(draws, tokens, strict=True):
            outputs[places[i]] = SliceOutput(token_id)
        return StepOutputs(tuple(outputs), tuple(slices[draws[row]].key for row in unsound))


class Graphs(Protocol):
    """Steps that are replayed: see engine/graphs.py."""

    def takes(self, layout: InputBatch) -> bool:
        """Whether `run` computes the layout's step."""
        ...

    def run(self, layout: InputBatch, table: SegmentTable) -> None:
        """Launch it: its tokens are drawn into the sampler's first rows."""
        ...


class AsyncExecutor:
    """StepExecutor on one accelerator, or on the first of a group; without `graphs` each step launches its kernels one
    by one."""

    def __init__(self, model: Model, cache: KVCache, sampler: DeviceSampler, graphs: Graphs | None) -> None:
        self._model, self._cache = model, cache
        self._sampler, self._graphs = sampler, graphs
        self._lay_out = InputBatchBuilder(cache.block_size)
        self._table = NO_SEGMENTS
        self._set: tuple[SampleRow, ...] = ()  # what the sampler's rows were set to, before they advanced
        self._adjusts = False  # whether any of them changes logits

    @torch.inference_mode()
    def launch(self, plan: StepPlan, lease: AdapterLease) -> Drawing | Computed:
        """See StepExecutor."""
        layout = self._lay_out(plan)
        table = self._segments(layout, lease)
        if self._reads_back(layout):
            self._set = ()
            return Computed(draw(layout, self._forward(layout, table)))
        rows = self._set_sampler(layout)
        if self._graphs is not None and not self._adjusts and self._graphs.takes(layout):
            self._graphs.run(layout, table)
        else:
            logits = self._forward(layout, table)
            if self._adjusts:
                self._sampler.adjust(logits, rows)
            self._sampler.draw(logits, advance=True)
        return Drawing(layout, self._sampler.fetch(len(layout.draws)))

    def _segments(self, layout: InputBatch, lease: AdapterLease) -> SegmentTable:
        """As `segments`; the last step's table where it is this one's too, which tells backends that they know it."""
        known, weights = self._table.segments, lease.weights
        if not layout.continues or any(each.adapter is not weights[each.adapter.digest] for each in known):
            self._table = segments(layout, lease)
        return self._table

    def _reads_back(self, layout: InputBatch) -> bool:
        """Whether the step asks for what the device's sampler does not tell. A layout that continues one that the
        sampler drew asks for nothing new."""
        if layout.continues and self._set:
            return False
        slices = layout.slices
        told = any(slices[i].request.params.logprobs is not None for i in layout.draws)
        return told or bool(layout.scored.any())

    def _set_sampler(self, layout: InputBatch) -> tuple[SampleRow, ...]:
        """Have the sampler's rows be the layout's; they are, if it continues the last and no logits are adjusted."""
        if self._adjusts or not (layout.continues and self._set):
            self._set = tuple(sample_row(layout.slices[i]) for i in layout.draws)
            self._adjusts = any(row.adjusts for row in self._set)
            self._sampler.refill(self._set)
        return self._set

    def _forward(self, layout: InputBatch, table: SegmentTable) -> Tensor:
        """[L, vocab]"""
        sent = _send(
            self._cache.device,
            layout.token_ids,
            layout.positions,
            layout.slots,
            layout.tables,
            layout.logit_rows,
            layout.pending,
            layout.sources,
        )
        token_ids, positions, slots, tables, logit_rows, pending, sources = sent
        if len(layout.pending):
            token_ids[pending] = self._sampler.tokens[sources]
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_lens=tuple(layout.query_lens.tolist()),
            context_lens=tuple(layout.context_lens.tolist()),
            block_tables=tables,
            logit_rows=logit_rows,
            segments=table,
        )
        return self._model.forward(batch, self._cache)


def _send(device: torch.device, *arrays: Integers) -> list[Tensor]:
    """The arrays on the device, cut from one copy, which is on its way when this returns."""
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
