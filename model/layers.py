"""The row-wise arithmetic between a layer's matrices. Stateless; rounding follows transformers' order."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + eps) over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    x: [..., n] of any float dtype. The quotient is computed in float32 and rounded to x's dtype before the
    weight.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2n] -> [T, n], gate in the first n columns."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
