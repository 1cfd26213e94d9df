"""h = scale * (A x), the first half of every adapter's update, for all sites of a group at once.

The depth is split: split s writes its partial sums to plane s of h, and who reads h adds the planes, always in the
same order. So there are no atomics, nothing to zero, and the same batch gives the same bits.
"""

# A kernel's arguments have the types that it is launched with, and its language is not quite Python.
# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl

HEADER = tl.constexpr(14)  # as in work
ENTRY = tl.constexpr(4)
GROUPS = tl.constexpr(6)
STAGES = tl.constexpr(3)  # of the loops over a row: while one tile is summed up, two are on their way


@triton.jit
def read_entry(entry):
    """Read (table, first row, rows, tile, first element of h) of a chunk or an item."""
    table = tl.load(entry).to(tl.pointer_type(tl.int64))
    first_row = tl.load(entry + 1)
    rows_and_tile = tl.load(entry + 2)
    h_at = tl.load(entry + 3)
    return table, first_row, rows_and_tile.to(tl.int32), (rows_and_tile >> 32).to(tl.int32), h_at


@triton.jit
def multiplicand(values):
    """Values as a matrix product takes them: those of one byte are widened, since the other factor is not so narrow."""
    WIDE: tl.constexpr = tl.bfloat16 if values.dtype.primitive_bitwidth == 8 else values.dtype
    return values.to(WIDE)


@triton.jit
def _shrink_row(x, A, ranks, rank, begin, end, depth, BLOCK_DEPTH: tl.constexpr):
    """Multiply one row of x, from `begin` to `end`, with rows `ranks` of A: [len(ranks)].

    A thread loads 8 neighbours at once and adds them up at once: one register where a plain sum would keep 8.
    """
    sums = tl.zeros([ranks.shape[0], BLOCK_DEPTH // 8], tl.float32)
    for at in tl.range(begin, end, BLOCK_DEPTH, num_stages=STAGES):
        k = at + tl.arange(0, BLOCK_DEPTH)
        row = tl.load(x + k, mask=k < depth, other=0.0).to(tl.float32)
        inside = (ranks < rank)[:, None] & (k < depth)[None, :]
        a = tl.load(A + ranks[:, None] * depth + k[None, :], mask=inside, other=0.0)
        products = tl.reshape(a.to(tl.float32) * row[None, :], [ranks.shape[0], BLOCK_DEPTH // 8, 8])
        sums += tl.sum(products, axis=2)
    return tl.sum(sums, axis=1)


@triton.jit
def _shrink_rows(
    x, A, ranks, rank, rows, begin, end, depth, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr
):
    """Do the same for several rows, as a matrix product: [BLOCK_ROWS, len(ranks)]."""
    row = tl.arange(0, BLOCK_ROWS)
    sums = tl.zeros([BLOCK_ROWS, ranks.shape[0]], tl.float32)
    for at in range(begin, end, BLOCK_DEPTH):
        k = at + tl.arange(0, BLOCK_DEPTH)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        left = tl.load(x + row[:, None] * depth + k[None, :], mask=inside, other=0.0)
        inside = (k < depth)[:, None] & (ranks < rank)[None, :]
        right = multiplicand(tl.load(A + ranks[None, :] * depth + k[:, None], mask=inside, other=0.0))
        sums = tl.dot(left.to(right.dtype), right, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["group", "record_at"])
def shrink(
    h,  # [SPLITS, plane] float32
    x,  # [T, depth]
    work,
    group,
    record_at,
    depth,
    plane,
    DTYPE: tl.constexpr,  # of A
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    ROW_DEPTH: tl.constexpr,
):
    """A unit of work is one item (rows of one adapter, BLOCK_RANK rows of its A) and one split of the depth."""
    units = tl.load(work + 2 + group) * SPLITS
    items = work + tl.load(work + 2 + GROUPS + group)
    share = tl.cdiv(tl.cdiv(depth, SPLITS), BLOCK_DEPTH) * BLOCK_DEPTH
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        table, first_row, rows, tile, h_at = read_entry(items + unit // SPLITS * ENTRY)
        record = table + record_at
        A = tl.multiple_of(tl.load(record).to(tl.pointer_type(DTYPE)), 64)
        scales = tl.load(record + 1).to(tl.pointer_type(tl.float32))
        rank = tl.load(record + 2).to(tl.int32)

        split = unit % SPLITS
        begin = split * share
        end = tl.minimum(begin + share, depth)
        ranks = tile * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        scale = tl.load(scales + ranks, mask=ranks < rank, other=0.0)
        part = h + split.to(tl.int64) * plane + h_at
        own = x + first_row * depth
        if BLOCK_ROWS == 1 or rows == 1:
            row = _shrink_row(own, A, ranks, rank, begin, end, depth, ROW_DEPTH)
            tl.store(part + ranks, row * scale, mask=ranks < rank)
        else:
            block = _shrink_rows(own, A, ranks, rank, rows, begin, end, depth, BLOCK_ROWS, BLOCK_DEPTH)
            at = tl.arange(0, BLOCK_ROWS)
            inside = (at < rows)[:, None] & (ranks < rank)[None, :]
            tl.store(part + at[:, None] * rank + ranks[None, :], block * scale[None, :], mask=inside)


@triton.jit(do_not_specialize=["group", "record_at"])
def shrink_tokens(
    h,  # [plane] float32: there is no depth to split
    token_ids,  # [T] int64
    work,
    group,
    record_at,
    depth,
    DTYPE: tl.constexpr,  # of A
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Compute h = scale * A[:, token]. A unit of work is one item."""
    items = work + tl.load(work + 2 + GROUPS + group)
    for unit in range(tl.program_id(0), tl.load(work + 2 + group).to(tl.int32), tl.num_programs(0)):
        table, first_row, rows, tile, h_at = read_entry(items + unit * ENTRY)
        record = table + record_at
        A = tl.multiple_of(tl.load(record).to(tl.pointer_type(DTYPE)), 64)
        scales = tl.load(record + 1).to(tl.pointer_type(tl.float32))
        rank = tl.load(record + 2).to(tl.int32)

        ranks = tile * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        row = tl.arange(0, BLOCK_ROWS)
        tokens = tl.load(token_ids + first_row + row, mask=row < rows, other=0)
        inside = (row < rows)[:, None] & (ranks < rank)[None, :]
        at = ranks[None, :].to(tl.int64) * depth + tokens[:, None]
        values = tl.load(A + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + ranks, mask=ranks < rank, other=0.0)
        tl.store(h + h_at + row[:, None] * rank + ranks[None, :], values * scale[None, :], mask=inside)
