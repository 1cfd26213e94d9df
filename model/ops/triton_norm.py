"""RMS norm in one pass over each row: as model.layers.rms_norm, rounded where it rounds."""

# A kernel's arguments have the types that it is launched with, and its language is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from lora.ops.triton_expand import rounded


@triton.jit
def rms_norm(
    out,  # [rows, n]
    x,  # [rows, n], a row every `stride` elements
    weight,  # [n]
    n,
    stride,
    eps,
    BLOCK: tl.constexpr,  # at least n
):
    """out = weight * x / sqrt(mean(x²) + eps), one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + at, mask=at < n, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / n + eps)
    weights = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
    normed = rounded(values * scale, x.dtype.element_ty) * weights
    tl.store(out + row * n + at, normed.to(x.dtype.element_ty), mask=at < n)
