"""Executor: one StepPlan in, one SliceOutput per slice out; where a step is computed when it is launched."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.runner.base import StepOutputs
from engine.runner.input_batch import InputBatch, InputBatchBuilder, Integers
from engine.runner.sampling_io import draw
from lora.segments import AdapterLease, Segment, SegmentTable
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Model
from scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Computed:
    """A plan that was computed when it was launched."""

    result: StepOutputs
    done: bool = True

    def outputs(self) -> StepOutputs:
        """See Computation."""
        return self.result


class Executor:
    """Runs plans one at a time on `model`, which is one device's or the first of a group's."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._lay_out = InputBatchBuilder(cache.block_size)

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computed:
        """See StepExecutor: the plan is computed when this returns."""
        return Computed(self.run(plan, lease))

    @torch.inference_mode()
    def run(self, plan: StepPlan, lease: AdapterLease) -> StepOutputs:
        """Compute the plan's tokens; `lease` holds its adapters. Raises what the model raises."""
        layout = self._lay_out(plan)
        assert not layout.pending.size, "a plan that is computed at once leaves no token to be drawn"
        logits = self._model.forward(self._batch(layout, lease), self._cache)
        return draw(layout, logits)

    def _batch(self, layout: InputBatch, lease: AdapterLease) -> ForwardBatch:
        return ForwardBatch(
            token_ids=self._send(layout.token_ids),
            positions=self._send(layout.positions),
            slots=self._send(layout.slots),
            query_lens=tuple(layout.query_lens.tolist()),
            context_lens=tuple(layout.context_lens.tolist()),
            block_tables=self._send(layout.tables),
            logit_rows=self._send(layout.logit_rows),
            segments=segments(layout, lease),
        )

    def _send(self, values: Integers) -> Tensor:
        return torch.from_numpy(values).to(self._cache.device)


def segments(layout: InputBatch, lease: AdapterLease) -> SegmentTable:
    """The batch's rows by adapter."""
    return SegmentTable(
        tuple(Segment(run.start, run.stop, lease.weights[run.digest]) for run in layout.runs if run.digest)
    )
