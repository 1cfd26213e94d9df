"""B h, the second half of every adapter's update, one tile of columns at a time: the pieces that a consumer of the
projection is fused from, and the plainest consumer, y + B h.

A consumer deals out units of (chunk, tile of columns). It reads the chunk's entry, the site's record, and adds
`expanded(...)` to the tile of y; under the base's table of rank 0 the sum has no terms.
"""

# A kernel's arguments have the types that it is launched with, and its language is not quite Python.
# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl

from lora.ops.triton.shrink import ENTRY, HEADER, STAGES, multiplicand, read_entry

SITE_WORDS = tl.constexpr(3)  # as in tables


@triton.jit
def _expand_row(h, Bt, rank, columns, width, plane, SPLITS: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """Multiply one row's h, [SPLITS planes, rank], with columns of Bt [rank, width]: [len(columns)]."""
    planes = tl.arange(0, SPLITS) * plane
    sums = tl.zeros([BLOCK_RANK, columns.shape[0]], tl.float32)
    for at in tl.range(0, rank, BLOCK_RANK, num_stages=STAGES):
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
    """Do the same for several rows, of `stride` elements of h each, as a matrix product: [BLOCK_ROWS, len(columns)]."""
    row = tl.arange(0, BLOCK_ROWS)
    own = h + row[:, None] * stride
    sums = tl.zeros([BLOCK_ROWS, columns.shape[0]], tl.float32)
    for at in tl.range(0, rank, BLOCK_RANK, num_stages=1):  # short; h comes in planes and from the cache
        ranks = at + tl.arange(0, BLOCK_RANK)
        inside = (row < rows)[:, None] & (ranks < rank)[None, :]
        left = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
        for split in tl.range(0, SPLITS, num_stages=1):  # a loop, since registers are short here
            left += tl.load(own + split * plane + ranks[None, :], mask=inside, other=0.0)
        inside = (ranks < rank)[:, None] & (columns < width)[None, :]
        right = multiplicand(tl.load(Bt + ranks[:, None] * width + columns[None, :], mask=inside, other=0.0))
        sums = tl.dot(left.to(right.dtype), right, sums, input_precision="ieee")
    return sums


@triton.jit
def _site(record, site, DTYPE: tl.constexpr):
    """Read (Bt, its first row of A, its rank, rows of the stacked A) of one site of the group."""
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
    """Compute B h of a chunk of one row, at columns of `site` (0, 1 or 2), `width` wide: [1, len(columns)] float32."""
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
    """Compute B h of a chunk of `rows` rows: [BLOCK_ROWS, len(columns)] float32."""
    Bt, first, rank, stride = _site(record, site, DTYPE)
    own = h + h_at + first
    return _expand_rows(own, Bt, rank, rows, stride, columns, width, plane, SPLITS, BLOCK_ROWS, BLOCK_RANK)


@triton.jit
def tile_of(rows, columns, width, stride, BLOCK_ROWS: tl.constexpr):
    """Return (offsets, mask) of a tile from its first row: the first `rows` rows count, and columns below `width`."""
    row = tl.arange(0, BLOCK_ROWS)
    return row[:, None] * stride + columns[None, :], (row < rows)[:, None] & (columns < width)[None, :]


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Round float32 values as a round trip through the model's dtype does."""
    return values.to(DTYPE).to(tl.float32)


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
    """Compute y = [residual +] (y + B h) in place, at up to three sites side by side; each sum is rounded as y is."""
    OUT: tl.constexpr = y.dtype.element_ty
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
        record = table + record_at
        start += first_row * stride
        if BLOCK_ROWS == 1 or rows == 1:
            at, inside = tile_of(1, columns, width, stride, 1)
            row = tl.load(y + start + at, mask=inside, other=0.0).to(tl.float32)
            if ADAPTED:
                row += expanded_row(h, h_at, record, site, columns, width, plane, DTYPE, SPLITS, BLOCK_RANK)
            if HAS_RESIDUAL:
                beside = tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
                row = rounded(row, OUT) + beside
            tl.store(y + start + at, row.to(OUT), mask=inside)
        else:  # other names, since a name has one shape
            ats, insides = tile_of(rows, columns, width, stride, BLOCK_ROWS)
            block = tl.load(y + start + ats, mask=insides, other=0.0).to(tl.float32)
            if ADAPTED:
                block += expanded_rows(
                    h, h_at, record, site, rows, columns, width, plane, DTYPE, SPLITS, BLOCK_ROWS, BLOCK_RANK
                )
            if HAS_RESIDUAL:
                besides = tl.load(residual + start + ats, mask=insides, other=0.0).to(tl.float32)
                block = rounded(block, OUT) + besides
            tl.store(y + start + ats, block.to(OUT), mask=insides)
