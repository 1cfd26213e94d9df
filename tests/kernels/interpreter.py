"""Where this process can run Triton's kernels: on a CUDA device, or in Triton's interpreter on the CPU.

The interpreter must be asked for before any kernel is defined (`TRITON_INTERPRET=1`), and then no kernel of the
process can be compiled, so its tests run in a process of their own. It keeps bfloat16 as uint16: this room mends
the two things that go silently wrong with that, products (of the bits, as integers) and rounding (toward zero).
It does not mend arithmetic on bfloat16 itself: kernels widen to float32 first, as they must on the device. A range
over a loaded number is mended too, of which numpy warns.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_TRITON = INTERPRETED or torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 bits (uint16), rounded to the nearest, ties to even."""
    return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def _mended_cast(cast: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(builder: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(builder, source, target)

    return cast_impl


def _mended_dot(dot: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def wide(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle(widen(operand.data), tl.float32)

    def create_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(builder, wide(a), wide(b), *rest)

    return create_dot


def _mended_index(patch: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_lang_tensor


if INTERPRETED:
    InterpreterBuilder.cast_impl = _mended_cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_dot = _mended_dot(InterpreterBuilder.create_dot)
    interpreter._patch_lang_tensor = _mended_index(interpreter._patch_lang_tensor)
