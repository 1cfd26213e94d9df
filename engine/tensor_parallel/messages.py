"""Define what the first process and its workers send each other: plain numbers and text, as msgpack.

A worker gets Load and answers Loaded, gets Reserve and answers Ready, then gets Steps, which are not answered.
PlaceShards, each answered by ShardPlaced, have a channel of their own, so that a load delays no step. Failed may
come instead of any answer.
"""

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from lora.segments import AdapterWeights, Segment, SegmentTable
from model.batch import ForwardBatch
from model.config import AttentionName, LinearName, Quantization


class Load(msgspec.Struct, frozen=True, tag=True):
    """Read part `rank` of `size` of the base model.

    `device`, `dtype`, `quantization`, `linear`, `attention` and `lora_dtype` are already resolved, `uses_triton` as in
    Backends. `threads` is how many a CPU may use, 0 for what the system says.
    """

    folder: str
    rank: int
    size: int
    device: str
    dtype: str
    quantization: Quantization
    linear: LinearName
    attention: AttentionName
    lora_dtype: str
    uses_triton: bool
    threads: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The weights are read."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Take memory as the first process did, and join the other processes by the file `rendezvous`.

    Replayed steps have at most `graph_blocks` blocks a sequence.
    """

    rendezvous: str
    num_blocks: int
    block_size: int
    adapter_bytes: int
    graph_blocks: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Steps and adapters may come."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """What the host must know of a ForwardBatch; its tensors are broadcast among the devices, in one.

    `width` is the block tables'. `segments`, and those of the logits, are (first row, row after the last, digest).
    With `replayed` it is a step that the first process replays, of `rows` rows, the last of which may belong to no
    sequence.
    """

    rows: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    width: int
    num_logits: int
    segments: tuple[tuple[int, int, str], ...]
    logit_segments: tuple[tuple[int, int, str], ...]
    replayed: bool


class PlaceShard(msgspec.Struct, frozen=True, tag=True):
    """Keep this shard of an adapter `offset` bytes into the arena; `nbytes` bytes follow the message.

    What lay there is forgotten. `header` is the shard's, as lora.format.packed writes it.
    """

    digest: str
    header: str
    offset: int
    nbytes: int


class ShardPlaced(msgspec.Struct, frozen=True, tag=True):
    """The shard may be named in steps."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on, and ends."""

    reason: str


Message = Load | Loaded | Reserve | Ready | Step | PlaceShard | ShardPlaced | Failed


def describe(batch: ForwardBatch, replayed: bool = False) -> Step:
    """Describe a batch for the other processes."""
    return Step(
        rows=len(batch.token_ids),
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        prompt_lens=batch.prompt_lens,
        width=batch.block_tables.shape[1],
        num_logits=len(batch.logit_rows),
        segments=_named(batch.segments),
        logit_segments=_named(batch.logit_segments),
        replayed=replayed,
    )


def flatten(batch: ForwardBatch) -> Tensor:
    """Join all tensors, one after another: [`flat_size` of the batch's Step] int64."""
    tables = batch.block_tables.flatten()
    return torch.cat((batch.token_ids, batch.positions, batch.slots, tables, batch.logit_rows))


def flat_size(step: Step) -> int:
    """Count the elements of the batch's tensors together."""
    return sum(_sizes(step))


def rebuild(step: Step, flat: Tensor, weights: Callable[[str], AdapterWeights]) -> ForwardBatch:
    """Rebuild the batch that `step` describes and `flat` holds; `weights` finds an adapter by its digest."""
    token_ids, positions, slots, tables, logit_rows = torch.split(flat, _sizes(step))

    def found(named: tuple[tuple[int, int, str], ...]) -> SegmentTable:
        return SegmentTable(tuple(Segment(start, stop, weights(digest)) for start, stop, digest in named))

    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        query_lens=step.query_lens,
        context_lens=step.context_lens,
        block_tables=tables.view(len(step.query_lens), step.width),
        logit_rows=logit_rows,
        segments=found(step.segments),
        prompt_lens=step.prompt_lens,
        logit_segments=found(step.logit_segments),
    )


def _named(table: SegmentTable) -> tuple[tuple[int, int, str], ...]:
    return tuple((each.start, each.stop, each.adapter.digest) for each in table.segments)


def _sizes(step: Step) -> list[int]:
    rows = step.rows
    return [rows, rows, rows, len(step.query_lens) * step.width, step.num_logits]
