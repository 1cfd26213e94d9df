"""Bring q, k and v from their projection to attention, head by head and in place.

That is: add each row's adapter, norm q and k where the model does, rotate, and store keys and values in their slots.
"""

# A kernel's arguments have the types that it is launched with, and its language is not quite Python.
# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl

from lora.ops.triton.expand import expanded_row, expanded_rows, rounded
from lora.ops.triton.shrink import ENTRY, HEADER, read_entry


@triton.jit
def _finish(
    low,
    high,  # [rows, half] float32: the two halves of one head, which rotate into each other
    own,  # where the head of the first row lies in y
    row,  # [rows], of the batch
    inside,  # [rows, half]
    head,
    qk_heads,
    heads,  # of q
    half,
    stride,
    cos,
    sin,
    norm_weight,
    eps,
    slots,
    keys,
    values,
    block_size,
    cache_block,
    cache_row,
    cache_head,
    OUT: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    pair = tl.arange(0, low.shape[1])
    local = tl.arange(0, low.shape[0])
    low, high = rounded(low, OUT), rounded(high, OUT)
    if head < qk_heads:
        if HAS_NORM:
            low, high = tl.where(inside, low, 0.0), tl.where(inside, high, 0.0)
            mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * half)
            scale = tl.rsqrt(mean + eps)[:, None]
            weights = norm_weight + head * 2 * half + pair
            low_weight = tl.load(weights, mask=pair < half, other=0.0).to(tl.float32)
            high_weight = tl.load(weights + half, mask=pair < half, other=0.0).to(tl.float32)
            low = rounded(rounded(low * scale, OUT) * low_weight[None, :], OUT)
            high = rounded(rounded(high * scale, OUT) * high_weight[None, :], OUT)
        turn = row[:, None] * (2 * half) + pair[None, :]
        c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + turn + half, mask=inside, other=0.0).to(tl.float32)
        turned_low = rounded(low * c, OUT) - high * s
        high = rounded(high * c, OUT) + low * s
        low = turned_low
    at = local[:, None] * stride + pair[None, :]
    tl.store(own + at, low.to(OUT), mask=inside)
    tl.store(own + half + at, high.to(OUT), mask=inside)
    if head >= heads:
        slot = tl.load(slots + row, mask=tl.sum(inside.to(tl.int32), axis=1) > 0, other=-1)
        place = slot // block_size * cache_block + slot % block_size * cache_row
        cached = keys + (head - heads) * cache_head
        if head >= qk_heads:
            cached = values + (head - qk_heads) * cache_head
        where = place[:, None] + pair[None, :]
        kept = inside & (slot >= 0)[:, None]
        tl.store(cached + where, low.to(OUT), mask=kept)
        tl.store(cached + where + half, high.to(OUT), mask=kept)


@triton.jit(do_not_specialize=["record_at"])
def store_heads_expanded(
    y,  # [T, (heads + 2 * kv_heads) * 2 * half]
    h,
    work,
    record_at,
    plane,
    heads,
    kv_heads,
    half,  # of head_dim
    cos,  # [T, 2 * half]
    sin,  # [T, 2 * half], of which the upper half is read
    norm_weight,  # [heads + kv_heads, 2 * half]
    eps,
    slots,  # [T] int64; below 0 the row is in no cache
    keys,  # [blocks, block_size, kv_heads, 2 * half] with strides cache_*, as values
    values,
    block_size,
    cache_block,
    cache_row,
    cache_head,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    ADAPTED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """A unit of work is a chunk and a head."""
    OUT: tl.constexpr = y.dtype.element_ty
    tiles = heads + 2 * kv_heads
    qk_heads = heads + kv_heads
    stride = tiles * 2 * half
    units = tl.load(work + 1).to(tl.int32) * tiles
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        table, first_row, rows, _, h_at = read_entry(work + HEADER + unit // tiles * ENTRY)
        head = unit % tiles
        site = (head >= heads).to(tl.int32) + (head >= qk_heads).to(tl.int32)
        site_head = head - tl.where(site > 0, heads, 0) - tl.where(site > 1, kv_heads, 0)
        width = tl.where(site == 0, heads, kv_heads) * 2 * half
        pair = tl.arange(0, BLOCK_HALF)
        column = site_head * 2 * half + pair
        record = table + record_at
        own = y + first_row * stride + head * 2 * half
        if BLOCK_ROWS == 1 or rows == 1:
            inside = (pair < half)[None, :]
            low = tl.load(own + pair[None, :], mask=inside, other=0.0).to(tl.float32)
            high = tl.load(own + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
            if ADAPTED:
                low += expanded_row(h, h_at, record, site, column, width, plane, DTYPE, SPLITS, BLOCK_RANK)
                high += expanded_row(
                    h, h_at, record, site, column + half, width, plane, DTYPE, SPLITS, BLOCK_RANK
                )
            _finish(
                low, high, own, first_row + tl.arange(0, 1), inside, head, qk_heads, heads, half, stride, cos, sin,
                norm_weight, eps, slots, keys, values, block_size, cache_block, cache_row, cache_head, OUT, HAS_NORM,
            )  # fmt: skip
        else:  # other names, since a name has one shape
            local = tl.arange(0, BLOCK_ROWS)
            insides = (local < rows)[:, None] & (pair < half)[None, :]
            at = local[:, None] * stride + pair[None, :]
            lows = tl.load(own + at, mask=insides, other=0.0).to(tl.float32)
            highs = tl.load(own + half + at, mask=insides, other=0.0).to(tl.float32)
            if ADAPTED:
                lows += expanded_rows(
                    h, h_at, record, site, rows, column, width, plane, DTYPE, SPLITS, BLOCK_ROWS, BLOCK_RANK
                )
                highs += expanded_rows(
                    h,
                    h_at,
                    record,
                    site,
                    rows,
                    column + half,
                    width,
                    plane,
                    DTYPE,
                    SPLITS,
                    BLOCK_ROWS,
                    BLOCK_RANK,
                )
            _finish(
                lows, highs, own, first_row + local, insides, head, qk_heads, heads, half, stride, cos, sin,
                norm_weight, eps, slots, keys, values, block_size, cache_block, cache_row, cache_head, OUT, HAS_NORM,
            )  # fmt: skip
