"""Multiply rows by a matrix in compiled code, which reads the matrix as it is kept.

A row's result never depends on the batch.
"""

import ctypes
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lora.compiled import load_library
from model.config import Quantization

_COLUMNS = 32  # of a panel, whose weights lie together
_WORD_BYTES = 4  # one output's weights at following inputs


class Multiply(Protocol):
    """Multiplies `rows` rows of so many inputs, with so many threads; all but counts are addresses.

    See linear.cpp for what lies there; `scale` and `bias` may be None.
    """

    def __call__(
        self,
        x: int, rows: int, inputs: int, weights: int, outputs: int, scale: int | None, bias: int | None, y: int,
        is_int8: bool, threads: int,
    ) -> None: ...  # fmt: skip


@cache
def load_multiply() -> Multiply | None:
    """Load the compiled code; None where there is none. Raises RuntimeError, see load_library."""
    library = load_library("model.linear.native._linear")
    if library is None:
        return None
    address, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    multiply = library.loraserve_multiply
    multiply.argtypes = (address, number, number, address, number, address, address, address, flag, flag)
    multiply.restype = None
    return multiply


def is_native(weight: Tensor, quantization: Quantization) -> bool:
    """Tell whether compiled code takes the weight [N, K], bfloat16 on a CPU, as it is or in int8."""
    held = {"none": torch.bfloat16, "int8": torch.int8}.get(quantization)
    if held is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    return weight.shape[1] % (_WORD_BYTES // held.itemsize) == 0


class NativeLinear:
    """A weight in panels of 32 outputs, in bfloat16, or in int8 with a scale for each output.

    A row's sums have one order, so its result does not depend on what else is in the batch.
    """

    def __init__(self, multiply: Multiply, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """Lay out `weight` [N, K]; `scale` and `bias` are [N]."""
        self._multiply, self.outputs = multiply, len(weight)
        self.weight = _panels(weight)
        self.scale = None if scale is None else scale.float().contiguous()
        self._bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.outputs)
        if len(x):
            scale, bias = (None if each is None else each.data_ptr() for each in (self.scale, self._bias))
            rows, inputs = x.shape
            self._multiply(
                *(x.data_ptr(), rows, inputs, self.weight.data_ptr(), self.outputs, scale, bias),
                *(y.data_ptr(), self.weight.dtype == torch.int8, torch.get_num_threads()),
            )
        return y


def _panels(weight: Tensor) -> Tensor:
    """Lay out [N, K] as [panels, words of K, 32, numbers in a word], with zeros beyond N."""
    outputs, inputs = weight.shape
    per_word = _WORD_BYTES // weight.dtype.itemsize
    panels = -(-outputs // _COLUMNS)
    whole = torch.nn.functional.pad(weight, (0, 0, 0, panels * _COLUMNS - outputs)).contiguous()
    words = whole.view(torch.int32).view(panels, _COLUMNS, inputs // per_word)
    return words.transpose(1, 2).contiguous().view(weight.dtype).view(panels, -1, _COLUMNS, per_word)
