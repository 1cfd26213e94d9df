"""What the other devices rebuild is the batch that the first one ran."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from engine.tensor_parallel.messages import describe, flat_size, flatten, rebuild
from lora.segments import AdapterWeights, Segment, SegmentTable
from model.batch import ForwardBatch
from tests.model.driver import Piece, lay_out


def test_a_batch_is_rebuilt_whole() -> None:
    adapters = {name: AdapterWeights(name, {}) for name in ("a", "b")}
    segments = SegmentTable((Segment(1, 3, adapters["a"]), Segment(3, 7, adapters["b"])))
    batch = lay_out(
        [Piece((5,), 8, (3, 1, 2)), Piece((7, 9), 0, (4,)), Piece((1, 2, 3, 4), 4, (6, 5))], 4, segments
    )
    batch = replace(batch, logit_rows=torch.tensor([2, 6]), logit_segments=segments.of_rows((2, 6)))
    step, flat = describe(batch), flatten(batch)
    assert flat.shape == (flat_size(step),)
    found = rebuild(step, flat, adapters.__getitem__)
    for field in fields(ForwardBatch):
        ours, theirs = getattr(batch, field.name), getattr(found, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, field.name


def test_a_batch_without_logits_or_segments_too() -> None:
    batch = lay_out([Piece((5, 6), 0, (0,))], 4)
    bare = ForwardBatch(
        batch.token_ids, batch.positions, batch.slots, batch.query_lens, batch.context_lens, batch.block_tables,
        torch.tensor([], dtype=torch.int64), SegmentTable(()),
    )  # fmt: skip
    found = rebuild(describe(bare), flatten(bare), {}.__getitem__)
    assert found.segments == SegmentTable(())
    assert len(found.logit_rows) == 0
    assert torch.equal(found.block_tables, bare.block_tables)


def test_a_replayed_batch_has_rows_that_are_nobodys() -> None:
    batch = lay_out([Piece((5,), 8, (3, 1, 2)), Piece((7,), 2, (4,))], 4)
    spare = torch.arange(4)
    padded = replace(batch, token_ids=spare, positions=spare + 1, slots=spare + 2, logit_rows=spare)
    step = describe(padded, replayed=True)
    assert (step.rows, step.query_lens, step.replayed) == (4, (1, 1), True)
    found = rebuild(step, flatten(padded), {}.__getitem__)
    assert found.query_lens == (1, 1)
    for name in ("token_ids", "positions", "slots", "logit_rows", "block_tables"):
        assert torch.equal(getattr(found, name), getattr(padded, name)), name
