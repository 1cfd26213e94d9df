"""Choose how base matrices are kept and multiplied: the one place that knows all forms."""

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from model.config import LinearChoice, LinearName, Quantization
from model.linear.base import Linear
from model.linear.native.native_linear import NativeLinear, is_native, load_multiply
from model.linear.packed import PackedLinear, PlainLinear, is_packable
from model.linear.quantized import Fp8Linear, Int8Linear, to_int8

_ROWS = (1, 8, 32, 128)  # from one sequence's decode step to a prompt
_OUTPUTS, _INPUTS = 1024, 2048  # of the matrix that the forms are compared by
_REPEATS = 5


def choose_linear(name: LinearChoice, dtype: torch.dtype, device: torch.device) -> LinearName:
    """Return what `name` means for a model that computes in `dtype` on `device`, never auto.

    auto is native on a CPU where it was compiled, takes the dtype, and multiplies faster than torch when tried.
    Raises ValueError, saying why and what to do, if the one asked for cannot multiply here.
    """
    if name == "torch":
        return name
    refused = _refused(dtype, device)
    if name == "auto":
        return "torch" if refused or native_speed() < 1 else "native"
    if refused:
        raise ValueError(refused)
    return name


def make_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    quantization: Quantization = "none",
    linear: LinearName = "torch",
) -> Linear:
    """Keep `weight` [out_features, in_features] for the device that holds it; exact unless quantised.

    A weight that `linear` cannot keep takes torch's form.
    """
    multiply = load_multiply() if linear == "native" and is_native(weight, quantization) else None
    if quantization == "int8":
        return (
            Int8Linear(weight, bias) if multiply is None else NativeLinear(multiply, *to_int8(weight), bias)
        )
    if quantization == "fp8":
        return Fp8Linear(weight, bias)
    if multiply is not None:
        return NativeLinear(multiply, weight, None, bias)
    return PackedLinear(weight, bias) if is_packable(weight) else PlainLinear(weight, bias)


@cache
def native_speed() -> float:
    """Measure how many times as fast as torch compiled code multiplies here, in bfloat16.

    It is the geometric mean over steps of different sizes, each the best of some times in turns. One thread's own time
    on a processor is taken, which other programs hardly change.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured_speed()
    finally:
        torch.set_num_threads(threads)


def _measured_speed() -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator).bfloat16()
    ours, theirs = (make_linear(weight, linear=name) for name in ("native", "torch"))
    gains: list[float] = []
    for rows in _ROWS:
        x = torch.randn(rows, _INPUTS, generator=generator).bfloat16()
        times = [(_seconds(lambda x=x: theirs(x)), _seconds(lambda x=x: ours(x))) for _ in range(_REPEATS)]
        torch_s, native_s = (min(each) for each in zip(*times, strict=True))
        gains.append(math.log(torch_s / native_s))
    return math.exp(sum(gains) / len(gains))


def _seconds(work: Callable[[], object]) -> float:
    begin_s = time.thread_time()
    work()
    return time.thread_time() - begin_s


def _refused(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why compiled code cannot multiply here and what to do, if it cannot."""
    if device.type != "cpu":
        return f"it computes on a CPU, not on {device.type}: use auto"
    if load_multiply() is None:
        return "the project was installed without a C++ compiler: install one and the project again, or use torch"
    if dtype != torch.bfloat16:
        return f"it does not take {dtype}: use torch, or --dtype bfloat16"
    return None
