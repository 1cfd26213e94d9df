"""Compute a step where it is launched: one StepPlan in, one SliceOutput per slice out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.runner.base import StepOutputs
from engine.runner.input_batch import InputBatch, InputBatchBuilder, Integers
from engine.runner.sampling_io import sample_step
from engine.runner.token_masks import TokenMasks
from lora.segments import NO_SEGMENTS, AdapterLease, Segment, SegmentTable
from lora.target_modules import SiteGroup
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Model
from scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class FinishedComputation:
    """A plan that was computed when it was launched."""

    result: StepOutputs
    done: bool = True

    def outputs(self) -> StepOutputs:
        """See Computation."""
        return self.result


class Executor:
    """StepExecutor that computes one plan at a time on `model`, which is one device's or the first of several."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        """Compute with the model's K/V in `cache`."""
        self._model = model
        self._cache = cache
        self._inputs = InputBatchBuilder(cache.block_size)
        self._masks = TokenMasks()

    def launch(self, plan: StepPlan, lease: AdapterLease) -> FinishedComputation:
        """Compute the plan; see StepExecutor."""
        return FinishedComputation(self.run(plan, lease))

    @torch.inference_mode()
    def run(self, plan: StepPlan, lease: AdapterLease) -> StepOutputs:
        """Compute the plan's tokens; `lease` holds its adapters. Raises what the model raises."""
        inputs = self._inputs.build(plan)
        assert not inputs.pending.size, "a plan that is computed at once leaves no token to be drawn"
        logits = self._model.forward(self._forward_batch(inputs, lease), self._cache)
        return sample_step(inputs, logits, self._masks)

    def _forward_batch(self, inputs: InputBatch, lease: AdapterLease) -> ForwardBatch:
        segments = adapter_segments(inputs, lease)
        return ForwardBatch(
            token_ids=self._to_device(inputs.token_ids),
            positions=self._to_device(inputs.positions),
            slots=self._to_device(inputs.slots),
            query_lens=tuple(inputs.query_lens.tolist()),
            context_lens=tuple(inputs.context_lens.tolist()),
            block_tables=self._to_device(inputs.tables),
            logit_rows=self._to_device(inputs.logit_rows),
            segments=segments,
            prompt_lens=inputs.prompt_lens,
            logit_segments=logit_segments(inputs, segments),
        )

    def _to_device(self, values: Integers) -> Tensor:
        host = torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
        return host.to(self._cache.device)


def adapter_segments(inputs: InputBatch, lease: AdapterLease) -> SegmentTable:
    """Make the table of the batch's rows by adapter."""
    return SegmentTable(
        tuple(Segment(run.start, run.stop, lease.weights[run.digest]) for run in inputs.runs if run.digest)
    )


def logit_segments(inputs: InputBatch, segments: SegmentTable) -> SegmentTable:
    """Make the table of the batch's logit rows by adapter; of no rows where no adapter changes the head."""
    if not segments.adapts(SiteGroup.HEAD):
        return NO_SEGMENTS
    if len(inputs.logit_rows) == len(inputs.token_ids):
        return segments
    rows: list[int] = inputs.logit_rows.tolist()
    return segments.of_rows(rows)
