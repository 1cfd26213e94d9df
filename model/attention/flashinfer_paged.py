"""Attend over paged K/V by flashinfer, an optional library that nothing else imports.

A step of one-row sequences runs through flashinfer's decode kernel, any other step with all its rows through the
prefill kernel. Decode rows lie between prompts' rows, since the batch is ordered by adapter. To part them would cost
a gather and a scatter per layer, and a second launch. A prefill tile that holds one real row wastes products, not
bytes. 128 rows by 4 bytes of K/V are about 130 operations a byte. That is under half of what an H100 does in the time
of a byte, and flashinfer balances both kinds of work in one plan. Plans are made on host arrays, since a device array
would be read back. A row's last bits may depend on the batch: flashinfer splits long contexts by what else there is
to do.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.base import UnsupportedAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)

_LEAST_WORKSPACE_BYTES = 128 << 20
"""What flashinfer recommends for split contexts' partial sums; all wrappers share it."""
_MOST_REPLAYED_ROWS = 256
_TILE_ROWS = 16  # of the tensor cores, which one kv head's query heads share
_MOST_ON_PLAIN_CORES = 4  # query heads per kv head up to which plain cores keep up with memory in decode
_MOST_STRIDE = 1 << 32  # flashinfer keeps the elements from block to block in 32 bits

Integers = NDArray[np.int32]


class Wrapper(Protocol):
    """flashinfer's BatchDecodeWithPagedKVCacheWrapper or BatchPrefillWithPagedKVCacheWrapper."""

    def plan(self, *args: Any, **options: Any) -> None:
        """Lay out a step's work; see flashinfer."""
        ...

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        """Attend for one layer, into `out`; see flashinfer."""
        ...


class Library(Protocol):
    """What of flashinfer is used."""

    @property
    def BatchDecodeWithPagedKVCacheWrapper(self) -> Callable[..., Wrapper]:  # noqa: N802
        """Make a wrapper of the decode kernel."""
        ...

    @property
    def BatchPrefillWithPagedKVCacheWrapper(self) -> Callable[..., Wrapper]:  # noqa: N802
        """Make a wrapper of the prefill kernel."""
        ...


def load_flashinfer() -> Library:
    """Import the library. Raises UnsupportedAttention where it is not installed."""
    try:
        library: Any = importlib.import_module("flashinfer")
    except ImportError as error:
        raise UnsupportedAttention(
            "flashinfer", f"it cannot be imported ({error}): scripts/setup cuda, or choose triton"
        ) from error
    return library


@dataclass(frozen=True, slots=True)
class _FlashInferShape:
    """What every plan tells flashinfer of the model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def wants_tensor_cores(self) -> bool:
        """Whether decode does too many products per byte for the plain cores."""
        return self.num_heads // self.num_kv_heads > _MOST_ON_PLAIN_CORES

    @property
    def workspace_bytes(self) -> int:
        """Bytes that suffice for the widest step that is replayed.

        flashinfer then splits every context, and keeps a tile's sums in float32. It counts a tile for each row and
        for each 16 query heads of a kv head.
        """
        if not self.wants_tensor_cores:
            return _LEAST_WORKSPACE_BYTES
        group = self.num_heads // self.num_kv_heads
        tiles = _MOST_REPLAYED_ROWS + -(-_MOST_REPLAYED_ROWS * group // _TILE_ROWS)
        return max(_LEAST_WORKSPACE_BYTES, 4 * self.num_heads * tiles * _TILE_ROWS * (self.head_dim + 1))

    def sizes(self, cache: KVCache) -> tuple[int, int, int, int]:
        """Return num_qo_heads, num_kv_heads, head_dim and page_size."""
        return self.num_heads, self.num_kv_heads, self.head_dim, cache.block_size

    def options(self, cache: KVCache, window: int | None) -> dict[str, Any]:
        """Return a plan's options. flashinfer's window counts the positions to the left of a row's own."""
        return {
            "pos_encoding_mode": "NONE",
            "window_left": -1 if window is None else window - 1,
            "sm_scale": 1 / math.sqrt(self.head_dim),
            "q_data_type": cache.layout.dtype,
            "kv_data_type": cache.layout.dtype,
        }


class FlashInferAttention:
    """AttentionBackend, on a CUDA device, for DTYPES and HEAD_DIMS."""

    def __init__(self, config: ModelConfig, device: torch.device, library: Library) -> None:
        self._windows, self._library = config.windows, library
        self._shape = _FlashInferShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self._workspace = torch.zeros(self._shape.workspace_bytes, dtype=torch.uint8, device=device)
        windows = tuple(dict.fromkeys(self._windows))
        self._decodes = {window: _Planner(self._decode_wrapper(), device) for window in windows}
        self._prompts = {window: _Planner(self._prompt_wrapper(), device) for window in windows}

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "FlashInferStep":
        """See AttentionBackend."""
        _check(cache)
        longest = max(batch.query_lens)
        planners = self._decodes if longest == 1 else self._prompts
        for window, planner in planners.items():
            pages = _pages(batch, cache.block_size, window)
            tables = (_host(pages.indptr), pages.indices(batch.block_tables), _host(pages.last))
            sizes, options = self._shape.sizes(cache), self._shape.options(cache, window)
            if longest == 1:
                planner.plan(*tables, *sizes, **options)
            else:
                rows = _host(_indptr(batch.query_lens))
                options |= {"causal": True, "max_token_per_sequence": longest}
                planner.plan(rows, *tables, *sizes, **options)
        return FlashInferStep(cache, tuple(planners[window].wrapper for window in self._windows))

    def reserve(self, rows: int, blocks: int, cache: KVCache) -> "ReservedFlashInferStep":
        """See GraphAttention."""
        _check(cache)
        buffers = {window: _PlanBuffers.reserve(rows, blocks, cache) for window in self._decodes}
        planners = {
            window: _Planner(self._decode_wrapper(use_cuda_graph=True, **each.buffers), cache.device)
            for window, each in buffers.items()
        }
        step = FlashInferStep(cache, tuple(planners[window].wrapper for window in self._windows))
        return ReservedFlashInferStep(step, self._shape, planners, buffers)

    def _decode_wrapper(self, **options: Any) -> Wrapper:
        make = self._library.BatchDecodeWithPagedKVCacheWrapper
        cores = self._shape.wants_tensor_cores
        return make(self._workspace, "NHD", use_tensor_cores=cores, backend="fa2", **options)

    def _prompt_wrapper(self) -> Wrapper:
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")


@dataclass(frozen=True, slots=True)
class FlashInferStep:
    """AttentionStep: every layer's planned wrapper over one cache."""

    cache: KVCache
    wrappers: tuple[Wrapper, ...]  # by layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.wrappers[layer].run(q, self.cache.layer(layer), out=out)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class _PlanBuffers:
    """The device arrays of one reserved step and window, and what fills rows that no sequence takes."""

    indptr: Tensor  # [rows + 1] int32
    indices: Tensor  # [rows * blocks] int32
    last: Tensor  # [rows] int32
    nothing: Tensor  # [rows] int32: the block that is never written

    @classmethod
    def reserve(cls, rows: int, blocks: int, cache: KVCache) -> "_PlanBuffers":
        """Room for `rows` sequences of up to `blocks` blocks."""
        room = torch.zeros(1 + rows * (blocks + 2), dtype=torch.int32, device=cache.device)
        indptr, indices, last = torch.split(room, [rows + 1, rows * blocks, rows])
        nothing = torch.full((rows,), cache.zero_block, dtype=torch.int32, device=cache.device)
        return cls(indptr, indices, last, nothing)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """By the names of the decode wrapper's options."""
        return {
            "paged_kv_indptr_buffer": self.indptr,
            "paged_kv_indices_buffer": self.indices,
            "paged_kv_last_page_len_buffer": self.last,
        }


@dataclass(frozen=True, slots=True)
class ReservedFlashInferStep:
    """ReservedStep. Rows that no sequence takes attend to one token of the block that is never written."""

    step: FlashInferStep
    shape: _FlashInferShape
    planners: "dict[int | None, _Planner]"
    buffers: dict[int | None, _PlanBuffers]

    def refill(self, batch: ForwardBatch) -> None:
        """See ReservedStep."""
        cache = self.step.cache
        for window, each in self.buffers.items():
            pages = _pages(batch, cache.block_size, window)
            free = len(each.last) - len(pages.last)
            assert free >= 0, f"{len(pages.last)} sequences in a step reserved for {len(each.last)}"
            indptr = np.concatenate([pages.indptr, pages.indptr[-1] + np.arange(1, free + 1, dtype=np.int32)])
            indices = torch.cat([pages.indices(batch.block_tables), each.nothing[:free]])
            last = np.concatenate([pages.last, np.ones(free, dtype=np.int32)])
            sizes, options = self.shape.sizes(cache), self.shape.options(cache, window)
            self.planners[window].plan(_host(indptr), indices, _host(last), *sizes, **options)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        return self.step.attend(layer, q, k, v)


class _Planner:
    """A wrapper, whose plans wait until the last one's has left the host: each is written into the same pinned
    memory, which flashinfer's copy to the device may still be reading."""

    def __init__(self, wrapper: Wrapper, device: torch.device) -> None:
        self.wrapper = wrapper
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def plan(self, *args: Any, **options: Any) -> None:
        """The wrapper's own."""
        if self._copied is None:
            self.wrapper.plan(*args, **options)
            return
        self._copied.synchronize()
        self.wrapper.plan(*args, **options)
        self._copied.record()


@dataclass(frozen=True, slots=True)
class _Pages:
    """The blocks of S sequences that a window reaches: sequence i's are `picks[indptr[i]:indptr[i + 1]]`, places in the
    flattened block tables, and its last block holds `last[i]` tokens."""

    indptr: Integers
    picks: NDArray[np.int64]
    last: Integers

    def indices(self, block_tables: Tensor) -> Tensor:
        """The blocks themselves, int32, on the tables' device."""
        picks = torch.from_numpy(self.picks)
        if block_tables.device.type == "cuda":
            picks = picks.pin_memory().to(block_tables.device, non_blocking=True)
        return block_tables.flatten().index_select(0, picks).to(torch.int32)


def _pages(batch: ForwardBatch, block_size: int, window: int | None) -> _Pages:
    """Positions count from a sequence's end in flashinfer, so blocks before the window are left out."""
    rows, stop = np.array(batch.query_lens), np.array(batch.context_lens)
    first = np.zeros_like(stop) if window is None else np.maximum(0, stop - rows + 1 - window)
    first_block = first // block_size
    held = -(-stop // block_size) - first_block
    indptr = _indptr(held)
    sequence = np.repeat(np.arange(len(stop)), held)
    nth = np.arange(int(indptr[-1])) - indptr[:-1][sequence]
    picks = sequence * batch.block_tables.shape[1] + first_block[sequence] + nth
    return _Pages(indptr, picks, ((stop - 1) % block_size + 1).astype(np.int32))


def _indptr(counts: Sequence[int] | NDArray[np.int64]) -> Integers:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _host(values: Integers) -> Tensor:
    """Pinned where there is a device to copy to."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _check(cache: KVCache) -> None:
    keys, values = cache.layer(0)
    assert keys.stride() == values.stride(), "flashinfer reads keys and values by the same strides"
    assert keys.stride(0) < _MOST_STRIDE, "flashinfer keeps the distance of two blocks in 32 bits"
