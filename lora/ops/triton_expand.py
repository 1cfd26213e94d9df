"""B h, the second half of every adapter's update, one tile of columns at a time: the pieces that a consumer of the
projection is fused from, and the plainest consumer, y + B h.

A consumer deals out units of (chunk, tile of columns). It reads the chunk's entry, the site's record, and adds
`expanded(...)` to the tile of y; under the base's table of rank 0 the sum has no terms.
"""

# A kernel's arguments have the types that it is launched with.
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl

from lora.ops.triton_shrink import ENTRY, HEADER, read_entry

SITE_WORDS = tl.constexpr(3)  # as in triton_tables


@triton.jit
def _expand_row(h, Bt, rank, columns, width, plane, SPLITS: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """[len(columns)]: one row's h, [SPLITS planes, rank], with columns of Bt [rank, width]."""
    planes = tl.arange(0, SPLITS).to(tl.int64) * plane
    sums = tl.zeros([BLOCK_RANK, columns.shape[0]], tl.float32)
    for at in range(0, rank, BLOCK_RANK):
        ranks = at + tl.arange(0, BLOCK_RANK)
        parts = tl.load(h + planes[:, None] + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        inside = (ranks < rank)[:, None] & (columns < width)[None, :]
        b = tl.load(Bt + ranks[:, None] * width + columns[None, :], mask=inside, other=0.0)
        sums += tl.sum(parts, axis=0)[:, None] * b.to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def _expand_rows(
    h,
    Bt,
    rank,
    rows,
    stride,
    columns,
    width,
    plane,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """[BLOCK_ROWS, len(columns)]: the same for several rows, as a matrix product; a row of h has `stride` elements."""
    row = tl.arange(0, BLOCK_ROWS)
    sums = tl.zeros([BLOCK_ROWS, columns.shape[0]], tl.float32)
    for at in tl.range(0, rank, BLOCK_RANK, num_stages=1):  # short; h comes in planes and from the cache
        ranks = at + tl.arange(0, BLOCK_RANK)
        inside = (row < rows)[:, None] & (ranks < rank)[None, :]
        left = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
        for split in tl.static_range(SPLITS):
            part = h + plane * split + row[:, None] * stride + ranks[None, :]
            left += tl.load(part, mask=inside, other=0.0)
        inside = (ranks < rank)[:, None] & (columns < width)[None, :]
        right = tl.load(Bt + ranks[:, None] * width + columns[None, :], mask=inside, other=0.0)
        sums = tl.dot(left.to(right.dtype), right, sums, input_precision="ieee")
    return sums


@triton.jit
def _site(record, site, DTYPE: tl.constexpr):
    """(Bt, its first row of A, its rank, rows of the stacked A) of one site of the group."""
    words = record + 3 + site * SITE_WORDS
    Bt = tl.multiple_of(tl.load(words).to(tl.pointer_type(DTYPE)), 64)
    return Bt, tl.load(words + 1), tl.load(words + 2).to(tl.int32), tl.load(record + 2).to(tl.int32)


@triton.jit
def expanded_row(
    h,
    h_at,
    record,
    site,
    columns,
    width,
    plane,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """[1, len(columns)] float32: B h of a chunk of one row, at columns of `site` (0, 1 or 2), `width` wide."""
    Bt, first, rank, _ = _site(record, site, DTYPE)
    row = _expand_row(h + h_at + first, Bt, rank, columns, width, plane, SPLITS, BLOCK_RANK)
    return row[None, :]


@triton.jit
def expanded_rows(
    h,
    h_at,
    record,
    site,
    rows,
    columns,
    width,
    plane,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """[BLOCK_ROWS, len(columns)] float32: B h of a chunk of `rows` rows."""
    Bt, first, rank, stride = _site(record, site, DTYPE)
    own = h + h_at + first
    return _expand_rows(own, Bt, rank, rows, stride, columns, width, plane, SPLITS, BLOCK_ROWS, BLOCK_RANK)


@triton.jit
def _add_tile(y, residual, delta, row, columns, stop, stride, HAS_RESIDUAL: tl.constexpr, ROWS):
    """y = [residual +] (y + delta) at rows `row` and columns below `stop`; each sum is rounded as y is."""
    at = row[:, None] * stride + columns[None, :]
    inside = (tl.arange(0, row.shape[0]) < ROWS)[:, None] & (columns < stop)[None, :]
    summed = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) + delta
    if HAS_RESIDUAL:
        other = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        summed = summed.to(y.dtype.element_ty).to(tl.float32) + other
    tl.store(y + at, summed.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["record_at"])
def add_expanded(
    y,  # [T, width0 + width1 + width2]
    residual,  # as y, if there is one
    h,
    work,
    record_at,
    plane,
    width0,
    width1,
    width2,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    ALL_ROWS: tl.constexpr,  # or those with adapters only
    HAS_RESIDUAL: tl.constexpr,
    ADAPTED: tl.constexpr,  # some row has an adapter
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """y += B h in place, [plus the residual], at up to three sites side by side."""
    tiles0, tiles1 = tl.cdiv(width0, BLOCK_COLUMNS), tl.cdiv(width1, BLOCK_COLUMNS)
    tiles = tiles0 + tiles1 + tl.cdiv(width2, BLOCK_COLUMNS)
    stride = width0 + width1 + width2
    units = tl.load(work + (1 if ALL_ROWS else 0)).to(tl.int32) * tiles
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        table, first_row, rows, _, h_at = read_entry(work + HEADER + unit // tiles * ENTRY)
        tile = unit % tiles
        site = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        tile -= tl.where(site > 0, tiles0, 0) + tl.where(site > 1, tiles1, 0)
        start = tl.where(site > 0, width0, 0) + tl.where(site > 1, width1, 0)
        width = tl.where(site == 0, width0, tl.where(site == 1, width1, width2))
        columns = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        own = y + start
        beside = residual + start
        record = table + record_at
        if rows == 1:
            row = first_row + tl.arange(0, 1)
            delta = tl.zeros([1, BLOCK_COLUMNS], tl.float32)
            if ADAPTED:
                delta = expanded_row(h, h_at, record, site, columns, width, plane, DTYPE, SPLITS, BLOCK_RANK)
            _add_tile(own, beside, delta, row, columns, width, stride, HAS_RESIDUAL, rows)
        else:
            row = first_row + tl.arange(0, BLOCK_ROWS)
            delta = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            if ADAPTED:
                delta = expanded_rows(
                    h, h_at, record, site, rows, columns, width, plane, DTYPE, SPLITS, BLOCK_ROWS, BLOCK_RANK
                )
            _add_tile(own, beside, delta, row, columns, width, stride, HAS_RESIDUAL, rows)
