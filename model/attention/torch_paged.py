"""Attend over paged K/V in plain torch: the CPU's backend, and correct on any device.

Each sequence is one of four kinds of work, by its own lengths alone. Its result never depends on the batch.
  prompt   several rows, nothing cached: causal attention over the rows themselves, no gather;
  chunk    several rows after cached ones: gather the blocks, explicit mask;
  decode   one row: gather the blocks; the query heads of a kv head are its query rows, so none is repeated;
  short    one row and little K/V: sequences of like width share one gather and one padded call. A call of its
           own (about 20 µs) would cost more than the arithmetic.

Gathering whole blocks with one call per sequence beat every batched form from about 32 thousand K elements a
sequence on. Measured on one core: 5.7 ms against 7.5-10.6 padded (bf16, 32 sequences of 256-512 tokens, 8 kv heads
of 64); 1.25 ms against 0.7 padded (float32, 64 sequences of 20-200 tokens, 2 kv heads of 32).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache

_SHORT_ELEMENTS = 32_768  # K elements of one sequence up to which a padded call over many wins
_NARROWEST_BLOCKS = 4


Integers = NDArray[np.int64]


class TorchPagedAttention:
    """AttentionBackend for any device and dtype that torch's own attention takes."""

    def __init__(self, config: ModelConfig, plan_single: "PlanSingle | None" = None) -> None:
        """Attend for single rows by what `plan_single` plans, else in torch too."""
        self._windows, self._plan_single = config.windows, plan_single or _plan_single

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "TorchPagedStep":
        """Lay the step's work out, once for each distinct window."""
        works = {window: self._works(batch, cache, window) for window in dict.fromkeys(self._windows)}
        return TorchPagedStep(cache, tuple(works[window] for window in self._windows))

    def _works(self, batch: ForwardBatch, cache: KVCache, window: int | None) -> "tuple[AttentionWork, ...]":
        spans = _spans(batch, cache.block_size, window)
        single, several = np.flatnonzero(spans.rows == 1), np.flatnonzero(spans.rows != 1)
        works = self._plan_single(spans, single, batch, cache) if len(single) else ()
        return (*works, *(_several_work(spans, int(i), batch, cache, window) for i in several))


@dataclass(frozen=True, slots=True)
class TorchPagedStep:
    """AttentionStep: every layer's works over one cache."""

    cache: KVCache
    works: "tuple[tuple[AttentionWork, ...], ...]"  # by layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        keys, values = self.cache.layer(layer)
        rows, out = StepRows(q, k, v), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for work in self.works[layer]:
            work.attend(rows, keys, values, out)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step's rows: q [T, heads, head_dim], k and v [T, kv heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


class AttentionWork(Protocol):
    """Attends for some of the step's rows."""

    def attend(self, rows: StepRows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Write what they attend to into `out`, shaped as the rows' q; keys and values are a layer of the cache."""
        ...


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Several rows that are all of their sequence so far."""

    rows: slice
    mask: Tensor | None  # [rows, rows], only where a window is narrower than the prompt

    def attend(self, rows: StepRows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k, v = rows.k[self.rows], rows.v[self.rows]
        out[self.rows] = _attend_rows(rows.q[self.rows], k, v, self.mask)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several rows of a sequence that has cached tokens."""

    rows: slice
    blocks: Tensor  # [n]
    seen: slice  # the tokens in those blocks that a row may look at
    mask: Tensor  # [rows, tokens seen]

    def attend(self, rows: StepRows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k, v = _gather(keys, self.blocks)[self.seen], _gather(values, self.blocks)[self.seen]
        out[self.rows] = _attend_rows(rows.q[self.rows], k, v, self.mask)


@dataclass(frozen=True, slots=True)
class _Decode:
    """One row of a sequence with much K/V."""

    row: int
    blocks: Tensor  # [n]
    seen: slice

    def attend(self, rows: StepRows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k = _gather(keys, self.blocks)[self.seen].transpose(0, 1)[None]
        v = _gather(values, self.blocks)[self.seen].transpose(0, 1)[None]
        q = rows.q[self.row].reshape(1, k.shape[1], -1, k.shape[-1])
        out[self.row] = F.scaled_dot_product_attention(q, k, v).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class _Short:
    """One row each of several sequences, their K/V gathered to one width."""

    rows: Tensor  # [n]
    blocks: Tensor  # [n * width]
    stale: Tensor  # gathered tokens that share a block with the sequence's, but the row may not look at
    mask: Tensor  # [n, 1, 1, width * block_size], 0 or -inf

    def attend(self, rows: StepRows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k, v = self._gather(keys), self._gather(values)
        q = rows.q.index_select(0, self.rows).view(len(self.rows), k.shape[1], -1, k.shape[-1])
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        out.index_copy_(0, self.rows, attended.flatten(1, 2))

    def _gather(self, cached: Tensor) -> Tensor:
        """Return [n, kv heads, width * block_size, head_dim], zero where the row may not look.

        A mask alone would let an inf or NaN of the block's last owner spread, since 0 * NaN is NaN.
        """
        gathered = _gather(cached, self.blocks).index_fill_(0, self.stale, 0)
        return gathered.view(self.rows.shape[0], -1, *gathered.shape[1:]).transpose(1, 2)


def _gather(cached: Tensor, blocks: Tensor) -> Tensor:
    """Return [n * block_size, kv heads, head_dim]."""
    return cached.index_select(0, blocks).flatten(0, 1)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Masked, or without a mask causal, attention of one sequence: q [rows, heads, head_dim] and out alike."""
    q, k, v = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Spans:
    """The step's S sequences, each array [S] int64: their rows, and the positions `first .. stop - 1` that the rows
    may look at, and the blocks that hold those."""

    rows: Integers
    first_row: Integers
    first: Integers
    stop: Integers
    first_block: Integers
    stop_block: Integers


class PlanSingle(Protocol):
    """Plans the work of the sequences `single`, at least one, each of which has one row."""

    def __call__(
        self, spans: Spans, single: Integers, batch: ForwardBatch, cache: KVCache
    ) -> Sequence[AttentionWork]: ...


def _spans(batch: ForwardBatch, block_size: int, window: int | None) -> Spans:
    rows, stop = np.array(batch.query_lens), np.array(batch.context_lens)
    first = np.zeros_like(stop) if window is None else np.maximum(0, stop - rows + 1 - window)
    return Spans(rows, np.cumsum(rows) - rows, first, stop, first // block_size, -(-stop // block_size))


def _plan_single(
    spans: Spans, single: Integers, batch: ForwardBatch, cache: KVCache
) -> Sequence[AttentionWork]:
    """Plan the sequences `single`, of one row each."""
    short_tokens = _SHORT_ELEMENTS // (cache.layout.num_kv_heads * cache.layout.head_dim)
    short = np.zeros(len(spans.rows), np.bool_)
    short[single] = (spans.stop - spans.first)[single] <= short_tokens
    widths = np.where(short, _padded(spans.stop_block - spans.first_block), 0)
    together = [
        _short_work(spans, np.flatnonzero(widths == width), int(width), batch, cache)
        for width in np.unique(widths[short])
    ]
    return (*together, *(_decode_work(spans, int(i), batch, cache) for i in single if not short[i]))


def _padded(blocks: Integers) -> Integers:
    """The next power of two: it depends on the one sequence alone, and few widths occur in a step."""
    return np.maximum(_NARROWEST_BLOCKS, 1 << np.ceil(np.log2(blocks)).astype(np.int64))


def _short_work(spans: Spans, chosen: Integers, width: int, batch: ForwardBatch, cache: KVCache) -> _Short:
    """The sequences `chosen`, none of which spans more than `width` blocks."""

    def column(values: Integers) -> Tensor:
        return torch.from_numpy(values[chosen]).to(cache.device)[:, None]

    first_blocks, stop_blocks = column(spans.first_block), column(spans.stop_block)
    columns = first_blocks + torch.arange(width, device=cache.device)
    tables = batch.block_tables[torch.from_numpy(chosen).to(cache.device)]
    blocks = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
    positions = first_blocks * cache.block_size + torch.arange(width * cache.block_size, device=cache.device)
    seen = (positions >= column(spans.first)) & (positions < column(spans.stop))
    stale = ~seen & (positions < stop_blocks * cache.block_size)
    return _Short(
        rows=column(spans.first_row)[:, 0],
        blocks=torch.where(columns < stop_blocks, blocks, cache.zero_block).flatten(),
        stale=stale.flatten().nonzero()[:, 0],
        mask=_additive(seen, cache.layout.dtype)[:, None, None],
    )


def _decode_work(spans: Spans, i: int, batch: ForwardBatch, cache: KVCache) -> AttentionWork:
    return _Decode(int(spans.first_row[i]), *_blocks_seen(spans, i, batch, cache))


def _several_work(
    spans: Spans, i: int, batch: ForwardBatch, cache: KVCache, window: int | None
) -> AttentionWork:
    row, rows, first, stop = (int(each[i]) for each in (spans.first_row, spans.rows, spans.first, spans.stop))
    if rows == stop:
        hides = window is not None and window < stop
        return _Prompt(slice(row, row + rows), _mask(rows, first, stop, window, cache) if hides else None)
    mask = _mask(rows, first, stop, window, cache)
    return _Chunk(slice(row, row + rows), *_blocks_seen(spans, i, batch, cache), mask)


def _blocks_seen(spans: Spans, i: int, batch: ForwardBatch, cache: KVCache) -> tuple[Tensor, slice]:
    """Return the blocks that a sequence's rows may look at, and which of their tokens."""
    first, stop = int(spans.first[i]), int(spans.stop[i])
    outside = first % cache.block_size  # tokens of the first block that lie before the window
    blocks = batch.block_tables[i, int(spans.first_block[i]) : int(spans.stop_block[i])]
    return blocks, slice(outside, outside + stop - first)


def _mask(rows: int, first: int, stop: int, window: int | None, cache: KVCache) -> Tensor:
    """Return [rows, stop - first]: 0 where the row may look, -inf elsewhere."""
    queries = torch.arange(stop - rows, stop, device=cache.device)[:, None]
    positions = torch.arange(first, stop, device=cache.device)
    seen = positions <= queries
    if window is not None:
        seen &= positions > queries - window
    return _additive(seen, cache.layout.dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
