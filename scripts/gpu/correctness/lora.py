"""Check every LoRA kernel, alone and fused into its consumers, against the equation in float64."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lora.ops.base import LoraOp
from lora.segments import AdapterWeights, SegmentTable
from lora.target_modules import BaseShape, SiteGroup
from model.batch import ForwardBatch
from model.checkpoint import torch_dtype
from model.config import ModelConfig
from model.kv_cache import KVCache, KVLayout
from model.ops.base import GraphOps, LayerStep
from model.rope import inverse_frequencies
from scripts.gpu.context import CheckContext, relative_error
from scripts.gpu.correctness.inputs import ProjectionInput, adapter, projection_input, table_of, with_adapters
from scripts.gpu.finding import Finding, check

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Of the relative error: tf32 in place of float32 would be beyond it."""

RANKS = (8, 5, 64, 24, 128, 16)
SITES_OF = {5: ("q_proj", "v_proj", "up_proj"), 24: ("k_proj", "gate_proj", "down_proj", "o_proj")}
"""Ranks whose adapters have these sites alone."""

BATCHES: dict[str, Sequence[tuple[int, int | None]]] = {
    "decode, distinct": [(1, index) for index in range(6)] + [(3, None)],
    "decode, shared": [(9, 0), (2, None), (20, 1), (1, 4), (17, 3)],
    "mixed": [(1, None), (1, 0), (90, 1), (5, None), (1, 2), (37, 3), (1, 4)],
    "prefill": [(150, 3), (2, None), (65, 1), (64, 4), (1, 0), (130, None)],
    "base alone": [(6, None)],
}
"""Rows, and which of RANKS: the kernels' three shapes, and rows of the base."""

NARROW = torch.float8_e4m3fn
NARROW_BATCHES = ("decode, distinct", "decode, shared")

BLOCK_SIZE = 16


def findings(context: CheckContext) -> Iterator[Finding]:
    """Check each model, each batch, each group of sites."""
    for config in context.sizes.layers:
        base, dtype = config.base_shape(), torch_dtype(config.dtype)
        adapters = [adapter(context, base, dtype, rank, *_sites(rank)) for rank in RANKS]
        op, ops = context.backends.lora(base, dtype), context.backends.ops(config, dtype)
        for spec in BATCHES:
            where = f"{spec}, {config.hidden_size} wide, {str(dtype).removeprefix('torch.')}"
            yield from _alone(context, base, op, adapters, where)
            yield from context.guarded(f"fused, {where}", _fused(context, config, ops, adapters, where))
        if dtype == torch.bfloat16:
            yield from context.guarded(
                f"adapters in fp8, {config.hidden_size} wide", _narrow(context, config)
            )


def _narrow(context: CheckContext, config: ModelConfig) -> Iterator[Finding]:
    """Check adapters of a byte an element under a model of two."""
    base = config.base_shape()
    adapters = [adapter(context, base, NARROW, rank, *_sites(rank)) for rank in RANKS]
    op = context.backends.lora(base, NARROW)
    for spec in NARROW_BATCHES:
        yield from _alone(context, base, op, adapters, f"{spec}, in fp8, {config.hidden_size} wide, bfloat16")


def _sites(rank: int) -> Sequence[Sequence[str]]:
    return (SITES_OF[rank],) if rank in SITES_OF else ()


def _spec(where: str) -> Sequence[tuple[int, int | None]]:
    return next(BATCHES[name] for name in BATCHES if where.startswith(name))


def _dtype(where: str) -> torch.dtype:
    return next(dtype for dtype in LIMITS if where.endswith(str(dtype).removeprefix("torch.")))


def _alone(
    context: CheckContext, base: BaseShape, op: LoraOp, adapters: Sequence[AdapterWeights], where: str
) -> Iterator[Finding]:
    """Check shrink and expand into y."""
    spec, dtype = _spec(where), _dtype(where)
    table = table_of(spec, adapters)
    if not table.segments:
        return
    for group in SiteGroup:
        given = projection_input(context, base, group, sum(rows for rows, _ in spec), dtype)

        def run(given: ProjectionInput = given, group: SiteGroup = group) -> Tensor:
            y = given.y.clone()
            op.plan(table).add_lora(y, given.x, 0, group)
            return y

        want = partial(with_adapters, given, table, 0, group)
        yield from compared(context, f"lora {group.name.lower()}, {where}", op, run, want)


def compared(
    context: CheckContext, name: str, op: object, run: Callable[[], Tensor], want: Callable[[], Tensor]
) -> Iterator[Finding]:
    """Compare one result with `want`, and with a second run over memory that is filled with NaN."""

    @torch.inference_mode()
    def row() -> Finding:
        context.backends.poison(op)
        first = run()
        context.backends.poison(op)
        second = run()
        again = torch.equal(first, second)
        limit = LIMITS[first.dtype]
        error = relative_error(first, want()) if again else float("nan")
        return check(name, error, limit, "rel. error", "" if again else "two runs gave different bits")

    yield from context.try_finding(name, row)


def _fused(
    context: CheckContext, config: ModelConfig, ops: GraphOps, adapters: Sequence[AdapterWeights], where: str
) -> Iterator[Finding]:
    """Check the kernels that consume a projection, over one step."""
    spec, dtype = _spec(where), _dtype(where)
    total = sum(rows for rows, _ in spec)
    cache = KVCache(KVLayout.of(config, dtype, BLOCK_SIZE), -(-total // BLOCK_SIZE) + 1, context.device)
    slots = torch.randperm(total, device=context.device)
    batch = _batch(context, spec, slots, table_of(spec, adapters))
    with torch.inference_mode():
        step = ops.plan(batch, cache)
    base = config.base_shape()

    qkv = projection_input(context, base, SiteGroup.QKV, total, dtype)

    def heads() -> Tensor:
        for kept in cache.layer(0):
            kept.fill_(torch.nan)
        q, _, _ = step.store_heads(0, qkv.project, qkv.x, None)
        stored = [kept.flatten(0, 1)[slots] for kept in cache.layer(0)]
        return torch.cat([q, *stored], dim=1)

    yield from compared(
        context,
        f"heads, {where}",
        ops,
        heads,
        lambda: _rotated(config, batch, with_table(qkv, batch, SiteGroup.QKV)),
    )
    yield from _consumers(context, base, ops, step, batch, where)


def _consumers(
    context: CheckContext, base: BaseShape, ops: GraphOps, step: LayerStep, batch: ForwardBatch, where: str
) -> Iterator[Finding]:
    total, dtype = len(batch.slots), _dtype(where)
    gated = projection_input(context, base, SiteGroup.GATE_UP, total, dtype)

    def gate() -> Tensor:
        return step.gate(0, gated.project, gated.x)

    def silu() -> Tensor:
        low, up = with_table(gated, batch, SiteGroup.GATE_UP).chunk(2, dim=1)
        return low * low.sigmoid() * up

    yield from compared(context, f"gate, {where}", ops, gate, silu)
    for group in (SiteGroup.OUT, SiteGroup.DOWN):
        given = projection_input(context, base, group, total, dtype)
        beside = context.normal(*given.y.shape, dtype=dtype)

        def add(group: SiteGroup = group, given: ProjectionInput = given, beside: Tensor = beside) -> Tensor:
            return step.add(0, group, given.project, given.x, beside)

        def summed(
            group: SiteGroup = group, given: ProjectionInput = given, beside: Tensor = beside
        ) -> Tensor:
            return with_table(given, batch, group) + beside.double()

        yield from compared(context, f"add {group.name.lower()}, {where}", ops, add, summed)


def with_table(given: ProjectionInput, batch: ForwardBatch, group: SiteGroup) -> Tensor:
    """Compute the projection with the batch's adapters, in float64."""
    return with_adapters(given, batch.segments, 0, group)


def _batch(
    context: CheckContext, spec: Sequence[tuple[int, int | None]], slots: Tensor, table: SegmentTable
) -> ForwardBatch:
    lengths = [rows for rows, _ in spec]
    positions = torch.cat(
        [torch.arange(7 * number, 7 * number + rows) for number, rows in enumerate(lengths)]
    )
    return ForwardBatch(
        token_ids=torch.zeros_like(slots),
        positions=positions.to(context.device),
        slots=slots,
        query_lens=tuple(lengths),
        context_lens=tuple(7 * number + rows for number, rows in enumerate(lengths)),
        block_tables=torch.zeros(len(lengths), 1, dtype=torch.int64, device=context.device),
        logit_rows=torch.zeros(1, dtype=torch.int64, device=context.device),
        segments=table,
    )


def _rotated(config: ModelConfig, batch: ForwardBatch, y: Tensor) -> Tensor:
    """Split y [T, columns] float64 into q, k and v, and rotate q and k by position."""
    heads = y.view(len(y), -1, config.head_dim)
    qk, v = torch.split(heads, [config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=1)
    frequencies = inverse_frequencies(config.rope, config.head_dim).to(y.device).double()
    angle = (batch.positions[:, None].double() * frequencies)[:, None]
    low, high = torch.chunk(qk, 2, dim=-1)
    turned = (low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin())
    return torch.cat((torch.cat(turned, dim=-1), v), dim=1)
