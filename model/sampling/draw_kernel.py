"""Draw tokens in a Triton kernel: one program for each row of logits, several passes over a row in the L2 cache.

It computes what `model.sampling.sample` does, in the same order; read that first.
"""

# A kernel's arguments have the types that it is launched with.
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: basic, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from model.sampling.rows import DOUBLES, WORDS, Double, Word

_WORDS: tl.constexpr = tl.constexpr(WORDS)
_DOUBLES: tl.constexpr = tl.constexpr(DOUBLES)
_INVERSE: tl.constexpr = tl.constexpr(Word.INVERSE_TEMPERATURE)
_LOG_MIN_P: tl.constexpr = tl.constexpr(Word.LOG_MIN_P)
_TOP_K: tl.constexpr = tl.constexpr(Word.TOP_K)
_STREAM: tl.constexpr = tl.constexpr(Word.STREAM)
_POSITION: tl.constexpr = tl.constexpr(Word.POSITION)
_TOP_P: tl.constexpr = tl.constexpr(Double.TOP_P)
_SEED: tl.constexpr = tl.constexpr(Double.SEED)


@triton.jit
def draw_tokens(
    logits,  # [rows, vocab], of any float dtype
    row_stride,
    vocab,
    floats,  # the rows' parameters (see model/sampling/rows.py), seen as float32,
    integers,  # as int32,
    doubles,  # as float64
    longs,  # and as int64
    tokens,  # [rows] int64: what was drawn, 0 where that makes no sense
    sound,  # [rows] int64: 1, or 0 where the logits are not numbers
    few,  # [rows, FEW] float32: room for the likeliest tokens' scaled logits,
    few_tokens,  # [rows, FEW] int32: and for which they are
    TILE: tl.constexpr,
    FEW: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """Draw a token for one row of logits; with ADVANCE, its next draw is for the position after."""
    row = tl.program_id(0)
    source = logits + row.to(tl.int64) * row_stride
    largest, best, finite = _greedy(source, vocab, TILE)
    inverse = tl.load(floats + row * _WORDS + _INVERSE)
    token = best
    if finite & (inverse > 0):
        word, long = integers + row * _WORDS, row * _DOUBLES
        chance, _, _, _ = tl.philox(
            tl.load(longs + long + _SEED), tl.load(word + _POSITION), tl.load(word + _STREAM), 0, 0
        )
        uniform = (chance.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
        top_k, top_p = tl.load(word + _TOP_K), tl.load(doubles + long + _TOP_P)
        log_min_p = tl.load(floats + row * _WORDS + _LOG_MIN_P)
        likely, likely_tokens = few + row * FEW, few_tokens + row * FEW
        if (top_k < vocab) | (top_p < 1) | (log_min_p > float("-inf")):
            least, held, suffices = _filtered(
                source, vocab, largest, inverse, likely, likely_tokens, top_k, top_p, log_min_p, TILE, FEW
            )
            if suffices:
                token = tl.load(likely_tokens + _invert(likely, held, 0.0, 1.0, least, uniform, FEW))
            else:
                token = _invert(source, vocab, largest, inverse, least, uniform, TILE)
        else:
            token = _invert(source, vocab, largest, inverse, float("-inf"), uniform, TILE)
    if ADVANCE:
        at = integers + row * _WORDS + _POSITION
        tl.store(at, tl.load(at) + 1)
    tl.store(tokens + row, tl.where(finite, token, 0).to(tl.int64))
    tl.store(sound + row, finite.to(tl.int64))


@triton.jit
def _greedy(source, vocab, TILE: tl.constexpr):
    """The largest logit, the lowest token that has it, and whether all is well: no NaN, and the largest is finite."""
    lane = tl.arange(0, TILE)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    where = tl.zeros([TILE], tl.int32)
    broken = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        at = start + lane
        x = tl.load(source + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        broken |= (x != x).to(tl.int32)
        where = tl.where(x > largest, at, where)
        largest = tl.where(x > largest, x, largest)
    most = tl.max(largest, 0)
    first = tl.min(tl.where(largest == most, where, vocab), 0)
    finite = (tl.max(broken, 0) == 0) & (tl.abs(most) < float("inf"))
    return most, first, finite


@triton.jit
def _scaled(source, at, vocab, largest, inverse):
    """Scaled logits of tokens `at`: 0 for the likeliest, -inf beyond the vocabulary. A division would take longer than
    the load."""
    x = tl.load(source + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    return (x - largest) * inverse


@triton.jit
def _filtered(
    source,
    vocab,
    largest,
    inverse,
    few,
    tokens,
    top_k,
    top_p,
    log_min_p,
    TILE: tl.constexpr,
    FEW: tl.constexpr,
):
    """The least scaled logit that the filters keep; how many tokens `few` holds, and whether all that are kept are
    among those. The edges are looked for among these first, and in the whole row only if need be."""
    lowest, count, mass, bound = _survey(source, vocab, largest, inverse, TILE, FEW)
    held = _gather(source, vocab, largest, inverse, bound, few, tokens, TILE)
    suffices = held > 0
    _, few_lowest, _ = _above(few, held, 0.0, 1.0, bound, False, FEW)
    least = lowest
    if top_k < count:
        aim = top_k.to(tl.float64)
        if top_k <= held:
            least = _edge(few, held, 0.0, 1.0, few_lowest, aim, False, FEW)
            mass, _, _ = _above(few, held, 0.0, 1.0, least, True, FEW)
        else:
            least = _edge(source, vocab, largest, inverse, lowest, aim, False, TILE)
            mass, _, _ = _above(source, vocab, largest, inverse, least, True, TILE)
            suffices = least >= bound
    if top_p < 1:
        floor = tl.maximum(least, few_lowest)
        likely, _, _ = _above(few, held, 0.0, 1.0, floor, True, FEW)
        if suffices & (likely >= mass * top_p):
            least = _edge(few, held, 0.0, 1.0, floor, mass * top_p, True, FEW)
        else:
            least = _edge(source, vocab, largest, inverse, least, mass * top_p, True, TILE)
    least = tl.maximum(least, log_min_p)
    return least, held, (held > 0) & (least >= bound)


@triton.jit
def _survey(source, vocab, largest, inverse, TILE: tl.constexpr, FEW: tl.constexpr):
    """The least scaled logit above -inf, how many there are, their mass, and how far down there are at most FEW: one of
    a few depths, or 1 where even the likeliest are more."""
    lane = tl.arange(0, TILE)
    lowest = tl.full([TILE], 0.0, tl.float32)
    count, deep, middle, shallow = (
        tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    )  # fmt: skip
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        x = _scaled(source, start + lane, vocab, largest, inverse)
        finite = x > float("-inf")
        count += finite.to(tl.int32)
        lowest = tl.where(finite, tl.minimum(x, lowest), lowest)
        mass += tl.exp(x)
        deep += (x >= -16.0).to(tl.int32)
        middle += (x >= -9.0).to(tl.int32)
        shallow += (x >= -4.0).to(tl.int32)
    bound = tl.where(tl.sum(shallow, 0) <= FEW, -4.0, 1.0)
    bound = tl.where(tl.sum(middle, 0) <= FEW, -9.0, bound)
    bound = tl.where(tl.sum(deep, 0) <= FEW, -16.0, bound)
    return tl.min(lowest, 0), tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0), bound


@triton.jit
def _gather(source, vocab, largest, inverse, bound, few, tokens, TILE: tl.constexpr):
    """Write the scaled logits from `bound` on, and their tokens, in order of token id; how many they are."""
    lane = tl.arange(0, TILE)
    held = 0
    for start in range(0, vocab, TILE):
        x = _scaled(source, start + lane, vocab, largest, inverse)
        kept = x >= bound
        place = held + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(few + place, x, mask=kept)
        tl.store(tokens + place, start + lane, mask=kept)
        held += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of the program read what these wrote
    return held


@triton.jit
def _edge(source, vocab, largest, inverse, low, target, MASS: tl.constexpr, TILE: tl.constexpr):
    """Find the largest of the row's scaled logits such that it and all above it make up `target`.

    It bisects between `low`, which is one that does, and 0. Both ends snap to values that occur, so it ends exactly.
    """
    high = 0.0  # the largest that may be it
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where((middle <= low) | (middle > high), high, middle)
        reached, above, below = _above(source, vocab, largest, inverse, middle, MASS, TILE)
        enough = reached >= target
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def _above(source, vocab, largest, inverse, bound, MASS: tl.constexpr, TILE: tl.constexpr):
    """What the scaled logits from `bound` on make up, in tokens or in probability mass (times a constant); the least
    of them, and the largest below."""
    lane = tl.arange(0, TILE)
    reached = tl.zeros([TILE], tl.float32)  # a lane adds few; doubles would take longer than the load
    above = tl.full([TILE], 0.0, tl.float32)
    below = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        x = _scaled(source, start + lane, vocab, largest, inverse)
        kept = x >= bound
        reached += tl.where(kept, tl.exp(x) if MASS else 1.0, 0.0)
        above = tl.where(kept, tl.minimum(x, above), above)
        below = tl.where(kept, below, tl.maximum(x, below))
    return tl.sum(reached.to(tl.float64), 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _weights(source, at, vocab, largest, inverse, least):
    x = _scaled(source, at, vocab, largest, inverse)
    return tl.where(x >= least, tl.exp(x), 0.0).to(tl.float64)


@triton.jit
def _invert(source, vocab, largest, inverse, least, uniform, TILE: tl.constexpr):
    """The token at which the cumulative weight, in order of token id, passes `uniform` of the total."""
    lane = tl.arange(0, TILE)
    total = uniform * 0.0
    for start in range(0, vocab, TILE):
        total += tl.sum(_weights(source, start + lane, vocab, largest, inverse, least), 0)
    target = uniform * total
    before = uniform * 0.0  # weight of the tiles passed
    tile = 0
    after = tl.sum(_weights(source, lane, vocab, largest, inverse, least), 0)
    while (after <= target) & (tile + TILE < vocab):
        before = after
        tile += TILE
        after = before + tl.sum(_weights(source, tile + lane, vocab, largest, inverse, least), 0)
    weights = _weights(source, tile + lane, vocab, largest, inverse, least)
    passed = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
    last = tl.max(tl.where(weights > 0, tile + lane, -1), 0)  # where rounding leaves the sum a hair short
    return tl.minimum(tl.min(tl.where(passed, tile + lane, vocab), 0), last)
