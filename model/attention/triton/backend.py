"""Paged attention in Triton: the CUDA device's where flashinfer is absent, and wherever float32 or a head of another
size than flashinfer's is asked for.

The step is cut into items on the host and sent in one pinned copy; a grid of fixed size works them off. One-row items
and prompts' tiles are two launches of one kernel at two shapes: 16 rows of the tensor cores hold the query heads of
one kv head, 128 hold those heads of 32 rows of a prompt. Reserved steps keep all buffers in place, so that a captured
graph may be replayed over other lengths.
"""

# A launch takes options besides the kernel's arguments.
# pyright: reportCallIssue=false, reportUnknownVariableType=false

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.attention.triton.items import (
    ITEM_WORDS,
    MERGE_WORDS,
    MOST_SHARES,
    Items,
    lay_items,
    most_narrow_items,
)
from model.attention.triton.paged_kernels import attend_items, merge_shares
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache

_PROGRAMS_PER_PROCESSOR = 3  # of a reserved step: as many as fit at heads of 128
_ANY_NUMBER = 1 << 30
_HEADER_WORDS = 4  # how many narrow items, wide items and merges there are, and nothing


@dataclass(frozen=True, slots=True)
class _Tile:
    """What one program works on at a time: `lanes` are token rows times query heads of a kv head."""

    lanes: int
    tokens: int
    stages: int
    num_warps: int


_NARROW, _WIDE = _Tile(16, 64, 3, 4), _Tile(128, 64, 2, 8)
_NARROW_FLOAT32, _WIDE_FLOAT32 = _Tile(16, 32, 3, 4), _Tile(32, 32, 2, 4)  # the tensor cores would round it


def _tiles(dtype: torch.dtype) -> tuple[_Tile, _Tile]:
    """For single rows, and for prompts."""
    return (_NARROW_FLOAT32, _WIDE_FLOAT32) if dtype == torch.float32 else (_NARROW, _WIDE)


@dataclass(frozen=True, slots=True)
class _HeadShape:
    """What the kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def group_pad(self) -> int:
        """The next power of two."""
        return _power_of_2(self.group)

    def rows(self, tile: _Tile) -> int:
        """Token rows of a tile."""
        return max(1, tile.lanes // self.group_pad)


class TritonPagedAttention:
    """AttentionBackend for CUDA devices, any head size and block size; on a CPU under Triton's interpreter alone."""

    def __init__(self, config: ModelConfig) -> None:
        self._windows = config.windows
        self._shape = _HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "TritonPagedStep":
        """See AttentionBackend."""
        windows = tuple(dict.fromkeys(self._windows))
        rows = self._shape.rows(_tiles(cache.layout.dtype)[1])
        laid = [lay_items(batch.query_lens, batch.context_lens, window, rows) for window in windows]
        written = [_written(items, len(items.merges)) for items in laid]
        sent = _pinned(np.concatenate(written), cache.device).to(cache.device, non_blocking=True)
        words = torch.split(sent, [len(each) for each in written])
        slots = max(items.slots for items in laid)
        shares, weights = _share_buffers(slots, self._shape, cache.device)
        works = {
            window: _WindowWork.over(window, part, (len(items.merges), len(items.narrow), len(items.wide)))
            for window, part, items in zip(windows, words, laid, strict=True)
        }
        by_layer = tuple(works[window] for window in self._windows)
        return TritonPagedStep(cache, self._shape, _ANY_NUMBER, batch.block_tables, shares, weights, by_layer)

    def reserve(self, rows: int, blocks: int, cache: KVCache) -> "ReservedTritonStep":
        """See GraphAttention."""
        return ReservedTritonStep(self._windows, self._shape, rows, blocks, cache)


@dataclass(frozen=True, slots=True)
class _WindowWork:
    """One window's items on the device, and how many of each kind the buffers hold at most."""

    window: int | None
    counts: Tensor  # [4] int32: narrow, wide, merges, 0
    merges: Tensor  # [r, 4] int32
    narrow: Tensor  # [n, 8] int32
    wide: Tensor  # [m, 8] int32

    @classmethod
    def over(cls, window: int | None, words: Tensor, capacity: tuple[int, int, int]) -> "_WindowWork":
        """The parts of `words`, which `_written` lays out; `capacity` of merges, narrow and wide items."""
        widths = (MERGE_WORDS, ITEM_WORDS, ITEM_WORDS)
        lengths = [held * width for held, width in zip(capacity, widths, strict=True)]
        counts, *parts = torch.split(words, [_HEADER_WORDS, *lengths])
        return cls(window, counts, *(part.view(-1, width) for part, width in zip(parts, widths, strict=True)))


@dataclass(frozen=True, slots=True)
class TritonPagedStep:
    """AttentionStep: every layer's work over one cache."""

    cache: KVCache
    shape: _HeadShape
    programs: int  # of a launch, at most
    tables: Tensor  # [S, widest] int64
    shares: Tensor  # [slots, num_heads, head_dim] float32
    weights: Tensor  # [slots, num_heads] float32
    works: tuple[_WindowWork, ...]  # by layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        work = self.works[layer]
        if len(work.narrow):
            self._items(layer, q, out, work.narrow, work.counts[:1], wide=False)
        if len(work.wide):
            self._items(layer, q, out, work.wide, work.counts[1:2], wide=True)
        if len(work.merges):
            self._merge(out, work)
        return out.flatten(1)

    def _items(self, layer: int, q: Tensor, out: Tensor, items: Tensor, count: Tensor, wide: bool) -> None:
        keys, values = self.cache.layer(layer)
        shape, window = self.shape, self.works[layer].window
        tile = _tiles(q.dtype)[wide]
        attend_items[(min(self.programs, len(items) * shape.num_kv_heads),)](
            q, keys, values, out, self.shares, self.weights, items, count, self.tables,
            self.tables.stride(0),
            math.log2(math.e) / math.sqrt(shape.head_dim),
            window or 0,
            KV_HEADS=shape.num_kv_heads,
            GROUP=shape.group,
            GROUP_PAD=shape.group_pad if wide else max(tile.lanes, shape.group_pad),
            ROWS=shape.rows(tile) if wide else 1,
            TOKENS=tile.tokens,
            BLOCK=self.cache.block_size,
            D=shape.head_dim,
            D_PAD=_power_of_2(shape.head_dim),
            Q_ROW=q.stride(0),
            KV_BLOCK=keys.stride(0),
            KV_TOKEN=keys.stride(1),
            WINDOWED=window is not None,
            STAGES=tile.stages,
            num_warps=tile.num_warps,
        )  # fmt: skip

    def _merge(self, out: Tensor, work: _WindowWork) -> None:
        shape = self.shape
        merge_shares[(min(self.programs, len(work.merges) * shape.num_kv_heads),)](
            self.shares, self.weights, out, work.merges, work.counts[2:3],
            KV_HEADS=shape.num_kv_heads,
            GROUP=shape.group,
            GROUP_PAD=shape.group_pad,
            D=shape.head_dim,
            D_PAD=_power_of_2(shape.head_dim),
            MOST=MOST_SHARES,
            num_warps=2,
        )  # fmt: skip


class ReservedTritonStep:
    """ReservedStep: decode of up to `rows` sequences of up to `blocks` blocks each."""

    def __init__(
        self, windows: tuple[int | None, ...], shape: _HeadShape, rows: int, blocks: int, cache: KVCache
    ) -> None:
        self._windows, self._rows, self._blocks = tuple(dict.fromkeys(windows)), rows, blocks
        self._capacity = most_narrow_items(rows, blocks * cache.block_size)
        each = _HEADER_WORDS + self._capacity * ITEM_WORDS + rows * MERGE_WORDS
        device = cache.device
        self._words = torch.zeros(len(self._windows), each, dtype=torch.int32, device=device)
        self._tables = torch.zeros(rows, blocks, dtype=torch.int64, device=device)
        shares, weights = _share_buffers(self._capacity, shape, device)
        works = {
            window: _WindowWork.over(window, words, (rows, self._capacity, 0))
            for window, words in zip(self._windows, self._words, strict=True)
        }
        by_layer = tuple(works[window] for window in windows)
        programs = _programs(device)
        self._step = TritonPagedStep(cache, shape, programs, self._tables, shares, weights, by_layer)

    def refill(self, batch: ForwardBatch) -> None:
        """See ReservedStep."""
        sequences, widest = batch.block_tables.shape
        assert sequences <= self._rows, f"{sequences} sequences in a step reserved for {self._rows}"
        assert widest <= self._blocks, f"{widest} blocks in a step reserved for {self._blocks}"
        laid = [lay_items(batch.query_lens, batch.context_lens, window, 1) for window in self._windows]
        written = [_written(items, self._rows) for items in laid]
        sent = np.zeros((len(written), max(map(len, written))), dtype=np.int32)
        for row, each in zip(sent, written, strict=True):
            row[: len(each)] = each
        words = self._words[:, : sent.shape[1]]
        words.copy_(_pinned(sent, words.device), non_blocking=True)
        self._tables[:sequences, :widest].copy_(batch.block_tables, non_blocking=True)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        return self._step.attend(layer, q, k, v)


def _written(items: Items, room: int) -> np.ndarray:
    """Header, merges with room for `room`, narrow items, wide items: [words] int32."""
    header = np.array([len(items.narrow), len(items.wide), len(items.merges), 0], dtype=np.int32)
    nothing = np.zeros((room - len(items.merges)) * MERGE_WORDS, dtype=np.int32)
    return np.concatenate([header, items.merges.ravel(), nothing, items.narrow.ravel(), items.wide.ravel()])


def _pinned(values: np.ndarray, device: torch.device) -> Tensor:
    """Host memory that a device copies from without a wait; it is not reused before the copy has ended."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _share_buffers(slots: int, shape: _HeadShape, device: torch.device) -> tuple[Tensor, Tensor]:
    wide = (max(1, slots), shape.num_heads)
    shares = torch.empty(*wide, shape.head_dim, dtype=torch.float32, device=device)
    return shares, torch.empty(wide, dtype=torch.float32, device=device)


def _power_of_2(least: int) -> int:
    """The smallest that is no less."""
    return 1 << (least - 1).bit_length()


def _programs(device: torch.device) -> int:
    """As many programs as a device runs at once, so that each does its share of the work."""
    if device.type != "cuda":
        return _PROGRAMS_PER_PROCESSOR
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * _PROGRAMS_PER_PROCESSOR
