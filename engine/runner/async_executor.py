"""Compute steps on an accelerator without waiting for it.

A launch sends the step's integers down in one copy from pinned memory, starts the kernels and returns. Tokens that
the step before draws are read where they are drawn, on the device. Steps of one row per sequence are replayed as
graphs. A step that asks for log-probabilities is read back before its launch returns, as on a CPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.runner.base import DrawnTokens, StepGraphs, StepOutputs, StepSampler
from engine.runner.executor import FinishedComputation, adapter_segments, logit_segments
from engine.runner.input_batch import InputBatch, InputBatchBuilder, Integers
from engine.runner.sampling_io import sample_row, sample_step
from engine.runner.token_masks import TokenMasks
from lora.segments import NO_SEGMENTS, AdapterLease, SegmentTable
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Model
from model.sampling.sample import SampleRow
from scheduler.plan import SequenceKey, SliceOutput, StepPlan


@dataclass(frozen=True, slots=True)
class RunningComputation:
    """A launched plan whose tokens are on their way to the host."""

    inputs: InputBatch
    drawn: DrawnTokens
    stuck: tuple[SequenceKey, ...] = ()

    @property
    def done(self) -> bool:
        """See Computation."""
        return self.drawn.done

    def outputs(self) -> StepOutputs:
        """See Computation."""
        tokens, invalid = self.drawn.tokens()
        slices, sampling, places = self.inputs.slices, self.inputs.sampling, self.inputs.places.tolist()
        outputs = [SliceOutput(None)] * len(slices)
        for i, token_id in zip(sampling, tokens, strict=True):
            outputs[places[i]] = SliceOutput(token_id)
        return StepOutputs(
            tuple(outputs), tuple(slices[sampling[row]].key for row in invalid), stuck=self.stuck
        )


class AsyncExecutor:
    """StepExecutor on one accelerator, or on the first of several.

    Without `graphs` each step launches its kernels one by one.
    """

    def __init__(self, model: Model, cache: KVCache, sampler: StepSampler, graphs: StepGraphs | None) -> None:
        """Compute with the model's K/V in `cache`; `graphs` draw with the same `sampler`."""
        self._model, self._cache = model, cache
        self._sampler, self._graphs = sampler, graphs
        self._inputs = InputBatchBuilder(cache.block_size)
        self._segments = NO_SEGMENTS
        self._rows: tuple[SampleRow, ...] = ()  # what the sampler's rows were set to, before they advanced
        self._adjusts = False  # whether any of them changes logits
        self._masks = TokenMasks()
        self._stuck: tuple[SequenceKey, ...] = ()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, lease: AdapterLease) -> RunningComputation | FinishedComputation:
        """See StepExecutor."""
        inputs = self._inputs.build(plan)
        segments = self._find_segments(inputs, lease)
        if self._reads_back(inputs):
            self._rows = ()
            return FinishedComputation(sample_step(inputs, self._forward(inputs, segments), self._masks))
        rows = self._set_sampler(inputs)
        if self._graphs is not None and not self._adjusts and self._graphs.takes(inputs):
            self._graphs.run(inputs, segments)
        else:
            logits = self._forward(inputs, segments)
            if self._adjusts:
                self._sampler.adjust(logits, rows)
            self._sampler.draw(logits, advance=True)
        return RunningComputation(inputs, self._sampler.fetch(len(inputs.sampling)), self._stuck)

    def _find_segments(self, inputs: InputBatch, lease: AdapterLease) -> SegmentTable:
        """Return the last step's table where it is this one's too, so that backends recognise it, or a new one."""
        known, weights = self._segments.segments, lease.weights
        if not inputs.continues or any(each.adapter is not weights[each.adapter.digest] for each in known):
            self._segments = adapter_segments(inputs, lease)
        return self._segments

    def _reads_back(self, inputs: InputBatch) -> bool:
        """Return whether the step asks for what the device's sampler does not compute.

        A batch that continues one that the sampler drew asks for nothing new.
        """
        if inputs.continues and self._rows:
            return False
        slices = inputs.slices
        logprobs = any(slices[i].request.params.logprobs is not None for i in inputs.sampling)
        return logprobs or bool(inputs.scored.any())

    def _set_sampler(self, inputs: InputBatch) -> tuple[SampleRow, ...]:
        """Set the sampler's rows to the batch's.

        They are already if the batch continues the last one and no logits are adjusted.
        """
        if self._adjusts or not (inputs.continues and self._rows):
            sampling = [inputs.slices[i] for i in inputs.sampling]
            allowed, self._stuck = self._masks.of(sampling)
            self._rows = tuple(sample_row(part, allowed) for part in sampling)
            self._adjusts = any(row.adjusts for row in self._rows)
            self._sampler.refill(self._rows)
        return self._rows

    def _forward(self, inputs: InputBatch, segments: SegmentTable) -> Tensor:
        """Compute the logits [L, vocab]."""
        token_ids, positions, slots, tables, logit_rows, pending, sources = _to_device(
            self._cache.device,
            inputs.token_ids,
            inputs.positions,
            inputs.slots,
            inputs.tables,
            inputs.logit_rows,
            inputs.pending,
            inputs.sources,
        )
        if len(inputs.pending):
            token_ids[pending] = self._sampler.tokens[sources]
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_lens=tuple(inputs.query_lens.tolist()),
            context_lens=tuple(inputs.context_lens.tolist()),
            block_tables=tables,
            logit_rows=logit_rows,
            segments=segments,
            prompt_lens=inputs.prompt_lens,
            logit_segments=logit_segments(inputs, segments),
        )
        return self._model.forward(batch, self._cache)


def _to_device(device: torch.device, *arrays: Integers) -> list[Tensor]:
    """Copy the arrays to the device as one, and return its parts; the copy is under way when this returns."""
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = torch.split(packed.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
