"""ForwardBatch: the tensors of one step. The executor lays it out, the model reads it."""

from dataclasses import dataclass

from torch import Tensor

from lora.segments import NO_SEGMENTS, SegmentTable


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T rows of S sequences; each sequence's rows are adjacent and in order of position.

    token_ids, positions: [T] int64. slots: [T] int64, where each row's K/V goes (block * block_size + offset).
    query_lens, context_lens: S ints on the host: rows of the sequence in this step, and its tokens up to and
    including them. block_tables: [S, widest] int64, rows padded with 0; block i holds positions
    i * block_size onwards. logit_rows: [L] int64, the rows whose logits are wanted, ascending. logit_segments are
    those rows by adapter, or empty where no adapter changes the head. prompt_lens: S ints, the
    tokens of each sequence's whole prompt, which a dynamic rope goes by; empty for the context lens.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: Tensor
    logit_rows: Tensor
    segments: SegmentTable
    prompt_lens: tuple[int, ...] = ()
    logit_segments: SegmentTable = NO_SEGMENTS
