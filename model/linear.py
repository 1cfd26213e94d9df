"""The linear seam: y = x Wᵀ + b with a weight that is laid out once for the processor that multiplies by it.

On a CPU the weight is reordered into oneDNN's blocked layout at load, and the plain copy is let go. The weight may
be quantised instead, per output channel and symmetrically: W[n] = scale[n] * Q[n], scale[n] = max|W[n]| / most.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Quantization

Linear = Callable[[Tensor], Tensor]
"""[T, in_features] -> [T, out_features], both contiguous and of the weight's dtype."""


"""How a layer's base matrices are kept: as they are; in int8, a CPU's, with the activations as they are; or in
float8_e4m3fn, a GPU's, with the activations in it too, each row by its own scale."""

_INT8_MOST, _FP8_MOST = 127.0, 448.0  # the largest numbers of both forms
_MOST_NARROW_ROWS = 24
_WIDENED_OUTPUTS = 512  # of a weight at once: 2 MiB at 2,048 inputs, within a core's cache
_ROWS_HINT = 32  # rows that the blocked layout is chosen for; measured to serve 1 to 512 rows equally well


class PackedLinear:
    """A weight in oneDNN's blocked layout.

    In float32 a single row is computed as two equal ones: oneDNN then takes the same kernel for any number of
    rows. So a row's result does not depend on what else is in the batch. Measured bit for bit, 1 to 600 rows, at 4 %
    of the time of one row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        self._pairs_single_row = weight.dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and self._pairs_single_row:
            return self._multiply(x.expand(2, -1).contiguous())[:1]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class PlainLinear:
    """A weight as torch stores it, [out_features, in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class Int8Linear:
    """A weight in int8, a byte an element, multiplied by exact activations.

    Up to a few rows the product reads the bytes as they are; beyond, where its time grows with the rows, blocks of
    the weight are widened and multiplied as such. One core, bfloat16, 1M elements, against the packed form (us): 28 to
    41 for one row, 104 to 58 for 8, 412 (widened 334) to 168 for 32, 1863 (777) to 622 for 128.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = _scale(weight, _INT8_MOST)
        self.weight = (weight.float() / scale).round_().to(torch.int8)
        self.scale = scale[:, 0].to(weight.dtype)
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


def make_linear(weight: Tensor, bias: Tensor | None = None, quantization: Quantization = "none") -> Linear:
    """The fastest form of `weight` [out_features, in_features] on the device that holds it; exact unless quantised."""
    if quantization == "int8":
        return Int8Linear(weight, bias)
    if quantization == "fp8":
        return Fp8Linear(weight, bias)
    return PackedLinear(weight, bias) if _packable(weight) else PlainLinear(weight, bias)


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
