"""Compute what rows need between a layer's matrices in compiled code, as transformers rounds it."""

import numpy as np
import torch
from torch import Tensor

from model.ops.base import Heads
from model.ops.native.library import HEADS, RowFunctions
from model.ops.row_ops import HeadPlaces

DTYPES = (torch.float32, torch.bfloat16)


class NativeRows:
    """RowOps on a CPU, for rows of one of DTYPES. Results do not depend on a row's company."""

    def __init__(self, functions: RowFunctions) -> None:
        self._functions = functions

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See RowOps."""
        to, (rows, width) = torch.empty_like(x), x.shape
        self._functions.norm(x.data_ptr(), weight.data_ptr(), rows, width, eps, to.data_ptr(), *_how(x))
        return to

    def store_heads(self, y: Tensor, layer: int, qk_norm: Tensor | None, places: HeadPlaces) -> Heads:
        """See RowOps."""
        queries, dim = places.num_heads, y.shape[2]
        heads = (y.shape[1] - queries) // 2
        keys, values = places.cache.layer(layer)
        cos, sin = places.rotation.cos, places.rotation.signed_sin
        laid_out = np.array(
            (
                *(y.data_ptr(), 0 if qk_norm is None else qk_norm.data_ptr(), cos.data_ptr(), sin.data_ptr()),
                *(places.slots.data_ptr(), keys.data_ptr(), values.data_ptr()),
                *(keys.stride(0), places.cache.block_size, queries, heads, dim),
            ),
            HEADS,
        )
        self._functions.store_heads(laid_out.ctypes.data, len(y), places.eps, *_how(y))
        return Heads(*torch.split(y, [queries, heads, heads], dim=1))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See RowOps."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        to = gate_up.new_empty(rows, width)
        self._functions.gate(gate_up.data_ptr(), to.data_ptr(), rows, width, *_how(gate_up))
        return to

    def add(self, residual: Tensor, y: Tensor) -> Tensor:
        """See RowOps."""
        rows, width = y.shape
        self._functions.add(residual.data_ptr(), y.data_ptr(), rows, width, *_how(y))
        return y


def _how(x: Tensor) -> tuple[bool, int]:
    """Tell whether rows are bfloat16, and how many threads may compute."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()
