"""Define the arithmetic of single rows between a layer's matrices, and do it in plain torch.

Rounding follows transformers' order.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import KVCache
from model.ops.base import Heads
from model.rope import Rotation, rotate


@dataclass(frozen=True, slots=True)
class HeadPlaces:
    """Where a step's keys and values go in `cache`, and by what its rows' heads are turned."""

    cache: KVCache
    slots: Tensor  # [T] int64: block * block_size + offset
    rotation: Rotation
    num_heads: int
    eps: float  # of the norm of heads


class RowOps(Protocol):
    """Arithmetic whose rows know nothing of each other. Rows are contiguous and of the model's dtype."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return weight * x / sqrt(mean(x²) + eps) over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

        x: [..., n]. The quotient is computed in float32 and rounded to x's dtype before the weight.
        """
        ...

    def store_heads(self, y: Tensor, layer: int, qk_norm: Tensor | None, places: HeadPlaces) -> Heads:
        """Norm and turn the heads of y [T, heads, head_dim], q's, k's and v's, and store k and v. May overwrite y."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up: [T, 2n] -> [T, n], gate in the first n columns."""
        ...

    def add(self, residual: Tensor, y: Tensor) -> Tensor:
        """Return residual + y, [T, n]. May overwrite y."""
        ...


class TorchRows:
    """RowOps in plain torch, on any device and in any float dtype."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See RowOps."""
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight

    def store_heads(self, y: Tensor, layer: int, qk_norm: Tensor | None, places: HeadPlaces) -> Heads:
        """See RowOps."""
        num_heads, num_kv_heads = places.num_heads, (y.shape[1] - places.num_heads) // 2
        qk, v = torch.split(y, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if qk_norm is not None:
            qk = self.norm(qk, qk_norm, places.eps)
        q, k = torch.split(rotate(qk, places.rotation), [num_heads, num_kv_heads], dim=1)
        places.cache.write(layer, places.slots, k, v)
        return Heads(q, k, v)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See RowOps."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def add(self, residual: Tensor, y: Tensor) -> Tensor:
        """See RowOps."""
        return residual + y
