"""Keep a weight quantised, per output channel and symmetrically: W[n] = scale[n] * Q[n], scale[n] = max|W[n]| / most.

It is in int8 on a CPU, with the activations as they are. On a GPU it is in float8_e4m3fn, with the activations in it
too, each row by its own scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_INT8_MOST, _FP8_MOST = 127.0, 448.0  # the largest numbers of both forms
_MOST_NARROW_ROWS = 24
_WIDENED_OUTPUTS = 512  # of a weight at once: 2 MiB at 2,048 inputs, within a core's cache


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, int8 of the weight's shape [N, K], and the channels' scales, [N] float32."""
    scale = _scale(weight, _INT8_MOST)
    return (weight.float() / scale).round_().to(torch.int8), scale[:, 0]


class Int8Linear:
    """A weight in int8, a byte an element, multiplied by exact activations.

    Up to a few rows the product reads the bytes as they are; beyond, where its time grows with the rows, blocks of
    the weight are widened and multiplied as such. One core, bfloat16, 1M elements, against the packed form (us): 28 to
    41 for one row, 104 to 58 for 8, 412 (widened 334) to 168 for 32, 1863 (777) to 622 for 128.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, scale = to_int8(weight)
        self.scale = scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > _MOST_NARROW_ROWS:
            y = self._multiply_widened(x)
        elif x.shape[0]:
            y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        else:
            y = x.new_empty(0, len(self.scale))
        return y if self._bias is None else y.add_(self._bias)

    def _multiply_widened(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], len(self.scale))
        for start in range(0, len(self.scale), _WIDENED_OUTPUTS):
            stop = start + _WIDENED_OUTPUTS
            y[:, start:stop] = F.linear(x, self.weight[start:stop].to(x.dtype))
        return y.mul_(self.scale)


class Fp8Linear:
    """A weight in float8_e4m3fn, multiplied by activations that are rounded to it too, each row by its own scale.

    Bfloat16 in and out; accumulated in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = _scale(weight, _FP8_MOST)
        self.weight = (weight.float() / scale).to(torch.float8_e4m3fn)
        self.scale = scale.t().contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.weight.shape[0])
        scale = _scale(x, _FP8_MOST)
        rows = (x.float() / scale).to(torch.float8_e4m3fn)
        y = torch.ops.aten._scaled_mm(rows, self.weight.t(), scale, self.scale, out_dtype=x.dtype)
        return y if self._bias is None else y.add_(self._bias)


def _scale(x: Tensor, most: float) -> Tensor:
    """What each row is divided by for its largest element to become `most`: [n, 1] float32, never 0."""
    return x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / most
