"""A ForwardBatch on its way to the other devices: what the host reads as a Step, its tensors as one."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.group.messages import Step
from lora.segments import AdapterWeights, Segment, SegmentTable
from model.batch import ForwardBatch


def describe(batch: ForwardBatch, replayed: bool = False) -> Step:
    """What the other hosts need."""
    return Step(
        rows=len(batch.token_ids),
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        width=batch.block_tables.shape[1],
        num_logits=len(batch.logit_rows),
        segments=tuple((each.start, each.stop, each.adapter.digest) for each in batch.segments.segments),
        replayed=replayed,
    )


def flatten(batch: ForwardBatch) -> Tensor:
    """All tensors one after another, [`flat_size` of the batch's Step] int64."""
    tables = batch.block_tables.flatten()
    return torch.cat((batch.token_ids, batch.positions, batch.slots, tables, batch.logit_rows))


def flat_size(step: Step) -> int:
    """Elements of the batch's tensors together."""
    return sum(_sizes(step))


def rebuild(step: Step, flat: Tensor, weights: Callable[[str], AdapterWeights]) -> ForwardBatch:
    """The batch that `step` describes and `flat` holds; `weights` finds an adapter by its digest."""
    token_ids, positions, slots, tables, logit_rows = flat.split(_sizes(step))
    segments = tuple(Segment(start, stop, weights(digest)) for start, stop, digest in step.segments)
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        query_lens=step.query_lens,
        context_lens=step.context_lens,
        block_tables=tables.view(len(step.query_lens), step.width),
        logit_rows=logit_rows,
        segments=SegmentTable(segments),
    )


def _sizes(step: Step) -> list[int]:
    rows = step.rows
    return [rows, rows, rows, len(step.query_lens) * step.width, step.num_logits]
