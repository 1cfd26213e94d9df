"""Every implementation of LoraOp computes what the paper's equation says, for every mix of ranks, popularity and
batch, and leaves the rows of the base alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora.flat import Module, lay_out, view
from lora.ops.base import LoraOp
from lora.ops.grouped import GroupedLora
from lora.ops.reference import ReferenceLora
from lora.segments import NO_SEGMENTS, AdapterWeights, Segment, SegmentTable
from lora.sites import SITES, BaseShape, SiteGroup, SiteShape

OPS: dict[str, LoraOp] = {"reference": ReferenceLora(), "grouped": GroupedLora()}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RANKS = {"all-8": (8,), "all-128": (128,), "mixed": (8, 16, 32, 64, 128), "odd": (5, 24, 1, 37)}
# Rows per request and the request's adapter, None for the base.
BATCHES: dict[str, list[tuple[int, int | None]]] = {
    "decode-distinct": [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)],
    "decode-zipf": [(4, 0), (2, 1), (1, 2), (1, 3), (3, None)],
    "decode-identical": [(8, 0)],
    "decode-holes": [(1, None), (1, 0), (2, None), (1, 1), (1, None), (1, 2), (1, None)],
    "prefill-distinct": [(17, 0), (33, 1)],
    "prefill-identical": [(64, 0)],
    "mixed": [(1, 0), (1, None), (19, 1), (5, None), (1, 2), (40, 3)],
    "none": [(6, None)],
}


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's rows: the output of the base projection, the input, and whose rows they are."""

    y: Tensor
    x: Tensor
    table: SegmentTable


def base(hidden: int) -> BaseShape:
    """Two layers with grouped-query attention and a wider MLP."""
    kv, inner = hidden // 4, hidden * 2
    sizes = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden))
    mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
    return BaseShape(2, tuple(SiteShape(*size) for size in (*sizes, *mlp)))


def adapter(
    shape: BaseShape, rank: int, seed: int, dtype: torch.dtype, sites: Sequence[str] = SITES
) -> AdapterWeights:
    """A random adapter whose ranks differ by site, in its flat form's views."""
    modules = [
        Module(layer, site, max(1, rank - index if seed % 2 else rank), scale=2.0 / (1 + seed))
        for layer in range(shape.num_layers)
        for index, site in enumerate(sites)
    ]
    layout = lay_out(shape, dtype, modules)
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.nbytes // dtype.itemsize, generator=rng) * 0.1
    rows.view(dtype).copy_(values)
    return view(rows, layout, f"digest-{seed}")


def batch(
    shape: BaseShape,
    group: SiteGroup,
    spec: list[tuple[int, int | None]],
    adapters: list[AdapterWeights],
    dtype: torch.dtype | None = None,
) -> Batch:
    """A batch laid out as `spec` says, of the adapters' dtype or another."""
    dtype = dtype or next(iter(adapters[0].groups.values())).A.dtype
    segments, start = [], 0
    for rows, index in spec:
        if index is not None:
            segments.append(Segment(start, start + rows, adapters[index % len(adapters)]))
        start += rows
    rng = torch.Generator().manual_seed(99)
    x = torch.randn(start, shape.of(group.sites[0]).in_features, generator=rng).to(dtype)
    y = torch.randn(start, shape.group_out(group), generator=rng).to(dtype)
    return Batch(y, x, SegmentTable(tuple(segments)))


def expected(given: Batch, layer: int, group: SiteGroup) -> Tensor:
    """The equation by its dense weights, in float64: y + x (s B A)^T, site by site."""
    y, x = given.y.double(), given.x.double()
    for segment in given.table.segments:
        weights = segment.adapter.groups.get((layer, group))
        for part in weights.parts if weights else ():
            rank_rows = slice(part.rank_start, part.rank_stop)
            assert weights is not None
            A = weights.scale[rank_rows, None].double() * weights.A[rank_rows].double()
            delta = part.Bt.double().t() @ A
            y[segment.start : segment.stop, part.out_start : part.out_stop] += (
                x[segment.start : segment.stop] @ delta.t()
            )
    return y


def assert_conforms(op: LoraOp, given: Batch, layer: int, group: SiteGroup) -> None:
    want, y = expected(given, layer, group), given.y.clone()
    with torch.inference_mode():
        op.plan(given.table).add_lora(y, given.x, layer, group)
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    for t in base_rows(given):
        assert torch.equal(y[t], given.y[t]), f"row {t} is the base model's"


def base_rows(given: Batch) -> Iterator[int]:
    taken = {t for segment in given.table.segments for t in range(segment.start, segment.stop)}
    return (t for t in range(given.y.shape[0]) if t not in taken)


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> LoraOp:
    return OPS[request.param]


@pytest.mark.parametrize("spec", BATCHES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_batch_of_every_rank_mix(op: LoraOp, dtype: torch.dtype, ranks: str, spec: str) -> None:
    shape = base(64)
    adapters = [adapter(shape, rank, seed, dtype) for seed, rank in enumerate(RANKS[ranks])]
    for group in SiteGroup:
        assert_conforms(op, batch(shape, group, BATCHES[spec], adapters), 1, group)


@pytest.mark.parametrize("spec", BATCHES)
def test_adapters_may_be_wider_than_the_model(op: LoraOp, spec: str) -> None:
    shape = base(64)
    adapters = [adapter(shape, rank, seed, torch.float32) for seed, rank in enumerate(RANKS["mixed"])]
    for group in SiteGroup:
        assert_conforms(op, batch(shape, group, BATCHES[spec], adapters, torch.bfloat16), 1, group)


@pytest.mark.parametrize("hidden", [160, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_width(op: LoraOp, dtype: torch.dtype, hidden: int) -> None:
    shape = base(hidden)
    adapters = [adapter(shape, rank, seed, dtype) for seed, rank in enumerate((8, 24))]
    for group in SiteGroup:
        assert_conforms(op, batch(shape, group, [(1, 0), (1, None), (9, 1)], adapters), 0, group)


@pytest.mark.parametrize("sites", [("v_proj",), ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("down_proj",)])
def test_adapters_that_skip_sites(op: LoraOp, sites: tuple[str, ...]) -> None:
    shape = base(64)
    adapters = [adapter(shape, 6, 0, torch.float32, sites), adapter(shape, 9, 1, torch.float32)]
    for group in SiteGroup:
        assert_conforms(op, batch(shape, group, [(1, 0), (2, 1), (3, None), (5, 0)], adapters), 0, group)


def test_no_segments_cost_nothing(op: LoraOp) -> None:
    shape = base(64)
    given = batch(shape, SiteGroup.OUT, [(4, None)], [adapter(shape, 4, 0, torch.float32)])
    y = given.y.clone()
    op.plan(NO_SEGMENTS).add_lora(y, given.x, 0, SiteGroup.OUT)
    assert torch.equal(y, given.y)


def test_rows_do_not_depend_on_their_company(op: LoraOp) -> None:
    """A row's result alone and among others agree as closely as its dtype allows."""
    shape = base(64)
    adapters = [adapter(shape, rank, seed, torch.float32) for seed, rank in enumerate((8, 24, 5))]
    together = batch(shape, SiteGroup.QKV, [(1, 0), (1, 1), (1, 2)], adapters)
    y = together.y.clone()
    op.plan(together.table).add_lora(y, together.x, 0, SiteGroup.QKV)
    for t, weights in enumerate(adapters):
        alone = together.y[t : t + 1].clone()
        op.plan(SegmentTable((Segment(0, 1, weights),))).add_lora(
            alone, together.x[t : t + 1], 0, SiteGroup.QKV
        )
        torch.testing.assert_close(alone[0], y[t], rtol=1e-6, atol=1e-6)
