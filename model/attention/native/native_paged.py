"""Attend over paged K/V by compiled code where a sequence has one row, and in torch where it has several.

A row's result never depends on the batch.
"""

import ctypes
from dataclasses import dataclass
from functools import cache as once
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.compiled import load_library
from model.attention.torch_paged import Integers, Spans, StepRows, TorchPagedAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache

DTYPES = (torch.float32, torch.bfloat16)
LANES = 16  # what a head's size is a multiple of

_CACHE = np.dtype(
    [
        ("keys", "u8"),
        ("values", "u8"),
        ("block_stride", "i8"),
        ("block_size", "i8"),
        ("heads", "i8"),
        ("dim", "i8"),
    ]
)
_SEQUENCE = np.dtype([("row", "i8"), ("first", "i8"), ("stop", "i8"), ("blocks", "u8")])


class Attend(Protocol):
    """Attends for `count` sequences over one layer's cache, with so many threads; all but counts are addresses.

    q's rows are `q_stride` numbers apart, and `queries` of its heads share one of the cache's.
    """

    def __call__(
        self,
        q: int, q_stride: int, out: int, cache: int, sequences: int, count: int,
        queries: int, is_narrow: bool, threads: int,
    ) -> None: ...  # fmt: skip


@once
def load_attend() -> Attend | None:
    """Load the compiled code; None where there is none. Raises RuntimeError, see load_library."""
    library = load_library("model.attention.native._attention", _CACHE, _SEQUENCE)
    if library is None:
        return None
    address, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    attend = library.loraserve_attend
    attend.argtypes = (address, number, address, address, address, number, flag, flag, flag)
    attend.restype = None
    return attend


def native_paged(config: ModelConfig, attend: Attend) -> TorchPagedAttention:
    """Make torch's backend with `attend` for single rows. Heads are of a multiple of LANES, all of one of DTYPES."""

    def plan_single(
        spans: Spans, single: Integers, batch: ForwardBatch, cache: KVCache
    ) -> "tuple[_SingleRows]":
        tables = batch.block_tables.contiguous()
        sequences = np.empty(len(single), _SEQUENCE)
        sequences["row"], sequences["first"] = spans.first_row[single], spans.first[single]
        sequences["stop"] = spans.stop[single]
        sequences["blocks"] = tables.data_ptr() + single * tables.stride(0) * tables.element_size()
        return (_SingleRows(attend, cache, tables, sequences),)

    return TorchPagedAttention(config, plan_single)


@dataclass(frozen=True, slots=True)
class _SingleRows:
    """One row each of several sequences, laid out as _SEQUENCE, whose blocks are rows of `tables`."""

    compiled: Attend
    cache: KVCache
    tables: Tensor
    sequences: NDArray[np.void]

    def attend(self, rows: StepRows, keys: Tensor, values: Tensor, out: Tensor) -> None:
        heads, dim = rows.k.shape[1:]
        layer = np.array(
            (keys.data_ptr(), values.data_ptr(), keys.stride(0), self.cache.block_size, heads, dim), _CACHE
        )
        self.compiled(
            *(rows.q.data_ptr(), rows.q.stride(0), out.data_ptr(), layer.ctypes.data),
            *(self.sequences.ctypes.data, len(self.sequences), rows.q.shape[1] // heads),
            *(rows.q.dtype == torch.bfloat16, torch.get_num_threads()),
        )
