"""Paged attention in plain torch: the CPU's default where the native one is not built, and correct on any
device.

Each sequence is one of four kinds of work, by its own lengths alone, so that its result never depends on what
else is in the batch:
  prompt   several rows, nothing cached: causal attention over the rows themselves, no gather;
  chunk    several rows after cached ones: gather the blocks, explicit mask;
  decode   one row: gather the blocks; the query heads of a kv head are its query rows, so no head is repeated;
  short    one row and little K/V: many such sequences of like width share one gather and one padded call, since
           the call's own cost (about 20 µs) would exceed the arithmetic's.
Gathering whole blocks and one call per sequence beat every batched form from about 32 thousand K elements a
sequence on (bf16, 32 sequences of 256-512 tokens, 8 kv heads of 64: 5.7 ms against 7.5-10.6 padded; float32,
64 of 20-200 tokens, 2 kv heads of 32: 1.25 against 0.7 padded).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache

_SHORT_ELEMENTS = 32_768  # K elements of one sequence below which a padded call over many wins
_NARROWEST_BLOCKS = 4


class TorchPagedAttention:
    """AttentionBackend for any device and dtype that torch's own attention takes."""

    def __init__(self, config: ModelConfig) -> None:
        self._windows = config.windows
        self._token_elements = config.kv_size

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "TorchPagedStep":
        """Lay the step's work out, once for each distinct window."""
        works = {
            window: self._works(batch, cache.block_size, window) for window in dict.fromkeys(self._windows)
        }
        return TorchPagedStep(cache, batch.slots, tuple(works[window] for window in self._windows))

    def _works(self, batch: ForwardBatch, block_size: int, window: int | None) -> "tuple[_Work, ...]":
        spans = _spans(batch, block_size, window)
        works: list[_Work] = []
        shorts: dict[int, list[_Span]] = defaultdict(list)
        for span in spans:
            if span.rows == 1 and span.tokens * self._token_elements <= _SHORT_ELEMENTS:
                shorts[_padded_blocks(span.stop_block - span.first_block)].append(span)
            else:
                works.append(_lone_work(span, batch, block_size, window))
        return (*(_short(group, width, batch, block_size) for width, group in shorts.items()), *works)


@dataclass(frozen=True, slots=True)
class TorchPagedStep:
    """AttentionStep: every layer's works over one cache."""

    cache: KVCache
    slots: Tensor
    works: "tuple[tuple[_Work, ...], ...]"  # by layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        self.cache.write(layer, self.slots, k, v)
        rows = _Rows(q.unflatten(1, (k.shape[1], -1)), k, v)
        out = torch.empty_like(rows.q, memory_format=torch.contiguous_format)
        keys, values = self.cache.layer(layer)
        for work in self.works[layer]:
            work.attend(rows, keys, values, out)
        return out.view(out.shape[0], -1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A step's rows: q [T, kv heads, group, head_dim], k and v [T, kv heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence of the step: its first row and count, and the positions `first .. stop - 1` that they may
    see."""

    sequence: int
    row: int
    rows: int
    first: int
    stop: int
    block_size: int

    @property
    def tokens(self) -> int:
        return self.stop - self.first

    @property
    def first_block(self) -> int:
        return self.first // self.block_size

    @property
    def stop_block(self) -> int:
        return -(-self.stop // self.block_size)


def _spans(batch: ForwardBatch, block_size: int, window: int | None) -> list[_Span]:
    spans, row = [], 0
    for sequence, (rows, stop) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        first = 0 if window is None else max(0, stop - rows + 1 - window)
        spans.append(_Span(sequence, row, rows, first, stop, block_size))
        row += rows
    return spans


class _Work(Protocol):
    """Attends for some of the step's rows and writes them to `out`, which is shaped as the rows' q."""

    def attend(self, rows: _Rows, keys: Tensor, values: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class _Prompt:
    """All of a sequence so far is in this step."""

    start: int
    stop: int
    mask: Tensor | None  # [rows, tokens], only where a window is narrower than the prompt

    def attend(self, rows: _Rows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k, v = rows.k[self.start : self.stop], rows.v[self.start : self.stop]
        q = rows.q[self.start : self.stop]
        out[self.start : self.stop] = _attend_rows(q, k, v, self.mask)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several rows of a sequence that has cached tokens; or one row of a long one, which needs no mask."""

    start: int
    stop: int
    blocks: Tensor  # [n]
    skip: int  # tokens of the first block that the window leaves out
    tokens: int
    mask: Tensor | None

    def attend(self, rows: _Rows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        k, v = self._gather(keys), self._gather(values)
        q = rows.q[self.start : self.stop]
        if self.mask is not None:
            out[self.start : self.stop] = _attend_rows(q, k, v, self.mask)
        else:
            out[self.start : self.stop] = F.scaled_dot_product_attention(
                q, k.transpose(0, 1)[None], v.transpose(0, 1)[None]
            )

    def _gather(self, cached: Tensor) -> Tensor:
        """[tokens, kv heads, head_dim]"""
        return cached.index_select(0, self.blocks).flatten(0, 1)[self.skip : self.skip + self.tokens]


@dataclass(frozen=True, slots=True)
class _Short:
    """One row each of several sequences whose K/V is gathered to one width."""

    rows: Tensor  # [n]
    blocks: Tensor  # [n * width]
    unseen: Tensor  # gathered tokens that are not the sequence's: another's, or stale
    mask: Tensor  # [n, 1, 1, width * block_size], 0 or -inf

    def attend(self, rows: _Rows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        q = rows.q.index_select(0, self.rows)
        k, v = self._gather(keys), self._gather(values)
        out.index_copy_(
            0, self.rows, F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask.to(q.dtype))
        )

    def _gather(self, cached: Tensor) -> Tensor:
        """[n, kv heads, width * block_size, head_dim]. Tokens that are not the sequence's are zeroed, because
        a mask does not stop another sequence's inf or NaN from spreading: 0 * NaN is NaN."""
        gathered = cached.index_select(0, self.blocks).flatten(0, 1).index_fill_(0, self.unseen, 0)
        return gathered.unflatten(0, (self.rows.shape[0], -1)).transpose(1, 2)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal (mask None) or masked attention of one sequence's rows: [rows, kv heads, group, head_dim]."""
    group = q.shape[2]
    k, v = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    mask = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q.permute(1, 2, 0, 3), k, v, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3)


def _lone_work(span: _Span, batch: ForwardBatch, block_size: int, window: int | None) -> _Work:
    start, stop = span.row, span.row + span.rows
    hides_none = window is None or span.stop <= window
    if span.rows == span.stop:
        return _Prompt(start, stop, None if hides_none else _mask(span, window, batch.slots.device))
    blocks = batch.block_tables[span.sequence, span.first_block : span.stop_block]
    mask = None if span.rows == 1 else _mask(span, window, batch.slots.device)
    return _Chunk(start, stop, blocks, span.first - span.first_block * block_size, span.tokens, mask)


def _mask(span: _Span, window: int | None, device: torch.device) -> Tensor:
    """[rows, tokens]: 0 where the row may look, -inf elsewhere."""
    queries = torch.arange(span.stop - span.rows, span.stop, device=device)[:, None]
    tokens = torch.arange(span.first, span.stop, device=device)
    seen = tokens <= queries
    if window is not None:
        seen &= tokens > queries - window
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


def _padded_blocks(blocks: int) -> int:
    """The next power of two: the width depends on the sequence alone, and few widths occur in a step."""
    return max(_NARROWEST_BLOCKS, 1 << (blocks - 1).bit_length())


def _short(spans: list[_Span], width: int, batch: ForwardBatch, block_size: int) -> _Short:
    device = batch.slots.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    first_blocks = column([span.first_block for span in spans])
    tables = batch.block_tables[column([span.sequence for span in spans])[:, 0]]
    columns = first_blocks + torch.arange(width, device=device)
    blocks = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
    tokens = first_blocks * block_size + torch.arange(width * block_size, device=device)
    seen = (tokens >= column([span.first for span in spans])) & (
        tokens < column([span.stop for span in spans])
    )
    mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
    rows = torch.tensor([span.row for span in spans], device=device)
    return _Short(rows, blocks.flatten(), (~seen).flatten().nonzero()[:, 0], mask[:, None, None])
