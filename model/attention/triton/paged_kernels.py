"""Attend over paged K/V in Triton kernels: what one program computes, and nothing of how work is laid out.

Work comes as items, rows of int32 on the device: (first row of q, rows, position of the first row, first token,
stop token, sequence, slot, 0). An item is a tile of one sequence's adjacent rows against a run of its tokens. With a
slot of -1 the run is all that the rows see, and the item writes their output. Else the sequence's tokens are split
over several items, and each leaves its rows' share in the slots from `slot` on. `merge_shares` adds those up in order
of position, so that the sum never depends on which program ran first.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), the tiling FlashAttention-2's (Dao, arXiv
2307.08691), the split over tokens Flash-Decoding's. The query heads of a kv head are rows of one tile, so that each
key and value is read once for all of them.
"""

# A kernel's arguments have the types that it is launched with.
# ruff: noqa: ANN001, ANN201
# pyright: basic, reportOperatorIssue=false

import triton
import triton.language as tl


# One compiled kernel for tables of any width, wherever they lie: steps differ in both.
@triton.jit(do_not_specialize=["widest", "window"], do_not_specialize_on_alignment=["tables"])
def attend_items(
    q,  # [T, num_heads, D], rows Q_ROW elements apart, heads adjacent
    keys,  # [blocks, BLOCK, kv heads, D], KV_BLOCK, KV_TOKEN and D elements apart
    values,  # as keys
    out,  # [T, num_heads, D], contiguous
    shares,  # [slots, num_heads, D] float32
    weights,  # [slots, num_heads] float32: the log2 of a share's softmax denominator
    items,  # [capacity, 8] int32
    count,  # [1] int32: how many of the items there are
    tables,  # [S, widest] int64
    widest,
    scale,  # 1 / sqrt(head_dim) * log2(e)
    window,  # tokens that a row sees, its own included; of no meaning unless WINDOWED
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    Q_ROW: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    KV_TOKEN: tl.constexpr,
    WINDOWED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend for one item and one kv head, and write the rows' output, or their share of it."""
    lane = tl.arange(0, ROWS * GROUP_PAD)
    row_in_tile, head_in_group = lane // GROUP_PAD, lane % GROUP_PAD
    column = tl.arange(0, D_PAD)
    for work in range(tl.program_id(0), tl.load(count) * KV_HEADS, tl.num_programs(0)):
        item, kv_head = items + (work // KV_HEADS) * 8, work % KV_HEADS
        first_row, rows, position = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        first, stop = tl.load(item + 3), tl.load(item + 4)
        table, slot = tables + tl.load(item + 5).to(tl.int64) * widest, tl.load(item + 6)

        real = (row_in_tile < rows) & (head_in_group < GROUP)
        cell = real[:, None] & (column < D)[None, :]
        head = kv_head * GROUP + head_in_group
        q_at = (first_row + row_in_tile).to(tl.int64) * Q_ROW + head * D
        queries = tl.load(q + q_at[:, None] + column[None, :], mask=cell, other=0.0)
        query_position = position + row_in_tile

        largest = tl.full([ROWS * GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([ROWS * GROUP_PAD], tl.float32)
        gathered = tl.zeros([ROWS * GROUP_PAD, D_PAD], tl.float32)
        ahead = first + tl.arange(0, TOKENS)
        page = tl.load(table + ahead // BLOCK, mask=ahead < stop, other=0)
        for start in tl.range(first, stop, TOKENS, num_stages=STAGES):
            token = start + tl.arange(0, TOKENS)
            inside = token < stop
            kv_at = page * KV_BLOCK + (token % BLOCK) * KV_TOKEN + kv_head * D
            kv_cell = inside[:, None] & (column < D)[None, :]
            k = tl.load(keys + kv_at[:, None] + column[None, :], mask=kv_cell, other=0.0)
            v = tl.load(values + kv_at[:, None] + column[None, :], mask=kv_cell, other=0.0)
            ahead = token + TOKENS  # the next tile's blocks are looked up before this tile is waited for
            page = tl.load(table + ahead // BLOCK, mask=ahead < stop, other=0)
            scores = tl.dot(queries, k.T, input_precision="ieee") * scale
            seen = inside[None, :] & (token[None, :] <= query_position[:, None])
            if WINDOWED:
                seen &= token[None, :] > query_position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
            reached = tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(reached == float("-inf"), 0.0, reached)  # a row that has seen nothing yet
            p = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(p, 1)
            gathered = tl.dot(p.to(v.dtype), v, gathered * shrink[:, None], input_precision="ieee")
            largest = reached

        some = tl.where(total == 0.0, 1.0, total)
        attended = gathered / some[:, None]
        if slot < 0:
            out_at = (first_row + row_in_tile).to(tl.int64) * (KV_HEADS * GROUP * D) + head * D
            tl.store(out + out_at[:, None] + column[None, :], attended.to(out.dtype.element_ty), mask=cell)
        else:
            share = (slot + row_in_tile).to(tl.int64) * (KV_HEADS * GROUP) + head
            tl.store(shares + share[:, None] * D + column[None, :], attended, mask=cell)
            tl.store(weights + share, largest + tl.log2(total), mask=real)


@triton.jit
def merge_shares(
    shares,
    weights,
    out,
    merges,  # [capacity, 4] int32: row of q, its first slot, slots from one share to the next, shares
    count,  # [1] int32
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MOST: tl.constexpr,
):
    """Compute out[row] = sum over shares of 2^weight * share / sum of 2^weight; at most MOST shares each."""
    in_group, column, share = tl.arange(0, GROUP_PAD), tl.arange(0, D_PAD), tl.arange(0, MOST)
    cell = (in_group < GROUP)[:, None] & (column < D)[None, :]
    for work in range(tl.program_id(0), tl.load(count) * KV_HEADS, tl.num_programs(0)):
        merge, head = merges + (work // KV_HEADS) * 4, (work % KV_HEADS) * GROUP + in_group
        row, slot = tl.load(merge).to(tl.int64), tl.load(merge + 1).to(tl.int64)
        apart, parts = tl.load(merge + 2), tl.load(merge + 3)
        at = (slot + share * apart)[None, :] * (KV_HEADS * GROUP) + head[:, None]
        there = (in_group < GROUP)[:, None] & (share < parts)[None, :]
        weight = tl.load(weights + at, mask=there, other=float("-inf"))
        heaviest = tl.max(weight, 1)
        heaviest = tl.where(heaviest == float("-inf"), 0.0, heaviest)
        whole = tl.sum(tl.exp2(weight - heaviest[:, None]), 1)
        merged = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
        for part in range(parts):
            place = (slot + part * apart) * (KV_HEADS * GROUP) + head
            lone = tl.load(weights + place, mask=in_group < GROUP, other=float("-inf"))
            value = tl.load(shares + place[:, None] * D + column[None, :], mask=cell, other=0.0)
            merged += tl.exp2(lone - heaviest)[:, None] * value
        whole = tl.where(whole == 0.0, 1.0, whole)
        out_at = (row * (KV_HEADS * GROUP) + head)[:, None] * D + column[None, :]
        tl.store(out + out_at, (merged / whole[:, None]).to(out.dtype.element_ty), mask=cell)
