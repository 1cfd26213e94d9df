"""Normalise rows, and gate them with each row's adapter added: Triton kernels that take one row each."""

# A kernel's arguments have the types that it is launched with, and its language is not quite Python.
# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl

from lora.ops.triton.expand import expanded_row, expanded_rows, rounded, tile_of
from lora.ops.triton.shrink import ENTRY, HEADER, read_entry


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
    """Compute out = weight * x / sqrt(mean(x²) + eps), one program for each row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + at, mask=at < n, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / n + eps)
    weights = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
    normed = rounded(values * scale, x.dtype.element_ty) * weights
    tl.store(out + row * n + at, normed.to(x.dtype.element_ty), mask=at < n)


@triton.jit
def _gated(gate, up, OUT: tl.constexpr):
    """Return silu(gate) * up of float32 tiles, rounded after each step as the projection's dtype is."""
    gate = rounded(gate, OUT)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), OUT)
    return (silu * rounded(up, OUT)).to(OUT)


@triton.jit(do_not_specialize=["record_at"])
def gate_expanded(
    out,  # [T, width]
    y,  # [T, 2 * width]: gate, up
    h,
    work,
    record_at,
    plane,
    width,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    ADAPTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A unit of work is a chunk and a tile of columns, of gate and of up."""
    OUT: tl.constexpr = y.dtype.element_ty
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    units = tl.load(work + 1).to(tl.int32) * tiles
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        table, first_row, rows, _, h_at = read_entry(work + HEADER + unit // tiles * ENTRY)
        columns = unit % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        record = table + record_at
        own = y + first_row * 2 * width
        target = out + first_row * width
        if BLOCK_ROWS == 1 or rows == 1:
            at, inside = tile_of(1, columns, width, 2 * width, 1)
            gate = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(own + width + at, mask=inside, other=0.0).to(tl.float32)
            if ADAPTED:
                gate += expanded_row(h, h_at, record, 0, columns, width, plane, DTYPE, SPLITS, BLOCK_RANK)
                up += expanded_row(h, h_at, record, 1, columns, width, plane, DTYPE, SPLITS, BLOCK_RANK)
            tl.store(target + columns[None, :], _gated(gate, up, OUT), mask=inside)
        else:  # other names, since a name has one shape
            ats, insides = tile_of(rows, columns, width, 2 * width, BLOCK_ROWS)
            gates = tl.load(own + ats, mask=insides, other=0.0).to(tl.float32)
            ups = tl.load(own + width + ats, mask=insides, other=0.0).to(tl.float32)
            if ADAPTED:
                gates += expanded_rows(
                    h, h_at, record, 0, rows, columns, width, plane, DTYPE, SPLITS, BLOCK_ROWS, BLOCK_RANK
                )
                ups += expanded_rows(
                    h, h_at, record, 1, rows, columns, width, plane, DTYPE, SPLITS, BLOCK_ROWS, BLOCK_RANK
                )
            places = tl.arange(0, BLOCK_ROWS)[:, None] * width + columns[None, :]
            tl.store(target + places, _gated(gates, ups, OUT), mask=insides)
