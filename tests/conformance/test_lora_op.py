"""Every implementation of LoraOp computes what the paper's equation says, for every mix of ranks, popularity and
batch, and leaves the rows of the base alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora.format.packed import Module, packed_layout, view
from lora.ops.base import LoraOp
from lora.ops.grouped import GroupedLora
from lora.ops.native.library import load_add_lora
from lora.ops.native.native_lora import NativeLora
from lora.ops.reference import ReferenceLora
from lora.ops.triton.op import TritonLora
from lora.segments import NO_SEGMENTS, AdapterWeights, Segment, SegmentTable
from lora.target_modules import LAYER_GROUPS, OUTER_SITES, SITES, BaseShape, SiteGroup, SiteShape
from tests.kernels.interpreter import DEVICE, INTERPRETED, RUNS_TRITON

CPU = torch.device("cpu")
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
class Backend:
    """An implementation, made from the base's shape and the adapters' dtype, and where its tensors are.

    One that is interpreted takes a second for each call: of the largest matrix of cases it is shown each batch and
    rank mix in one dtype, and of every case one group, in turn.
    """

    make: Callable[[BaseShape, torch.dtype], LoraOp]
    device: torch.device = CPU
    interpreted: bool = False

    def groups(self, *case: int) -> Sequence[SiteGroup]:
        groups = tuple(SiteGroup)
        return groups[sum(case) % len(groups) :][:1] if self.interpreted else groups

    def adapters(self, shape: BaseShape, ranks: Sequence[int], dtype: torch.dtype) -> list[AdapterWeights]:
        return [adapter(shape, rank, seed, dtype, device=self.device) for seed, rank in enumerate(ranks)]


BACKENDS = {
    "reference": Backend(lambda base, dtype: ReferenceLora()),
    "grouped": Backend(lambda base, dtype: GroupedLora()),
}
if (NATIVE := load_add_lora()) is not None:
    add_lora = NATIVE
    BACKENDS["native"] = Backend(lambda base, dtype: NativeLora(add_lora, dtype))
if RUNS_TRITON:
    BACKENDS["triton"] = Backend(lambda base, dtype: TritonLora(base, dtype, DEVICE), DEVICE, INTERPRETED)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's rows: the output of the base projection, the input (or token ids), and whose rows they are."""

    y: Tensor
    x: Tensor
    table: SegmentTable


def base(hidden: int) -> BaseShape:
    """Two layers with grouped-query attention and a wider MLP."""
    kv, inner = hidden // 4, hidden * 2
    sizes = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden))
    mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
    outer = SiteShape(hidden, 3 * hidden + 1), SiteShape(3 * hidden + 1, hidden)
    return BaseShape(2, tuple(SiteShape(*size) for size in (*sizes, *mlp)), outer)


def adapter(
    shape: BaseShape,
    rank: int,
    seed: int,
    dtype: torch.dtype,
    sites: Sequence[str] = (*SITES, *OUTER_SITES),
    device: torch.device = CPU,
) -> AdapterWeights:
    """A random adapter whose ranks differ by site, in its packed form's views."""
    modules = [
        Module(layer, site, max(1, rank - index if seed % 2 else rank), scale=2.0 / (1 + seed))
        for layer in range(shape.num_layers)
        for index, site in enumerate(sites)
        if layer == 0 or site in SITES
    ]
    layout = packed_layout(shape, dtype, modules)
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.nbytes // dtype.itemsize, generator=rng) * 0.1
    rows.view(dtype).copy_(values)
    return view(rows.to(device), layout, f"digest-{seed}")


def batch(
    shape: BaseShape,
    group: SiteGroup,
    spec: list[tuple[int, int | None]],
    adapters: list[AdapterWeights],
    dtype: torch.dtype | None = None,
) -> Batch:
    """A batch laid out as `spec` says, of the adapters' dtype or another."""
    kept = next(iter(adapters[0].groups.values())).A
    dtype = dtype or kept.dtype
    segments, start = [], 0
    for rows, index in spec:
        if index is not None:
            segments.append(Segment(start, start + rows, adapters[index % len(adapters)]))
        start += rows
    rng = torch.Generator().manual_seed(99)
    width = shape.of(group.sites[0]).in_features
    x = torch.randn(start, width, generator=rng).to(dtype)
    if group is SiteGroup.EMBEDDING:
        x = torch.randint(width, (start,), generator=rng)
    y = torch.randn(start, shape.group_out(group), generator=rng).to(dtype)
    return Batch(y.to(kept.device), x.to(kept.device), SegmentTable(tuple(segments)))


def expected(given: Batch, layer: int, group: SiteGroup) -> Tensor:
    """The equation by its dense weights, in float64 on the CPU: y + x (s B A)^T, site by site."""
    y, x = given.y.double().cpu(), given.x.cpu()
    for segment in given.table.segments:
        weights = segment.adapter.groups.get((layer, group))
        for part in weights.parts if weights else ():
            rank_rows = slice(part.rank_start, part.rank_stop)
            assert weights is not None
            A = (weights.scale[rank_rows, None].double() * weights.A[rank_rows].double()).cpu()
            delta, rows = A.t() @ part.Bt.double().cpu(), x[segment.start : segment.stop]
            update = delta[rows] if group is SiteGroup.EMBEDDING else rows.double() @ delta
            y[segment.start : segment.stop, part.out_start : part.out_stop] += update
    return y


def assert_conforms(op: LoraOp, given: Batch, layer: int, group: SiteGroup) -> None:
    layer = layer if group in LAYER_GROUPS else 0
    want, y = expected(given, layer, group), given.y.clone()
    with torch.inference_mode():
        op.plan(given.table).add_lora(y, given.x, layer, group)
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(
        y.double().cpu(), want, rtol=tolerance, atol=tolerance * float(want.abs().max())
    )
    for t in base_rows(given):
        assert torch.equal(y[t], given.y[t]), f"row {t} is the base model's"


def base_rows(given: Batch) -> Iterator[int]:
    taken = {t for segment in given.table.segments for t in range(segment.start, segment.stop)}
    return (t for t in range(given.y.shape[0]) if t not in taken)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.mark.parametrize("spec", BATCHES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_batch_of_every_rank_mix(backend: Backend, dtype: torch.dtype, ranks: str, spec: str) -> None:
    shape = base(64)
    op = backend.make(shape, dtype)
    adapters = backend.adapters(shape, RANKS[ranks], dtype)
    turn = list(RANKS).index(ranks), list(BATCHES).index(spec)
    if backend.interpreted and list(TOLERANCE)[sum(turn) % len(TOLERANCE)] is not dtype:
        pytest.skip("shown in another dtype")
    for group in backend.groups(*turn):
        assert_conforms(op, batch(shape, group, BATCHES[spec], adapters), 1, group)


@pytest.mark.parametrize("spec", BATCHES)
def test_adapters_may_be_wider_than_the_model(backend: Backend, spec: str) -> None:
    shape = base(64)
    op = backend.make(shape, torch.float32)
    adapters = backend.adapters(shape, RANKS["mixed"], torch.float32)
    for group in backend.groups(list(BATCHES).index(spec)):
        assert_conforms(op, batch(shape, group, BATCHES[spec], adapters, torch.bfloat16), 1, group)


@pytest.mark.parametrize("spec", BATCHES)
def test_adapters_may_be_of_one_byte_an_element(backend: Backend, spec: str) -> None:
    shape = base(64)
    op = backend.make(shape, torch.float8_e4m3fn)
    adapters = backend.adapters(shape, RANKS["mixed"], torch.float8_e4m3fn)
    for group in backend.groups(list(BATCHES).index(spec)):
        assert_conforms(op, batch(shape, group, BATCHES[spec], adapters, torch.bfloat16), 1, group)


@pytest.mark.parametrize("hidden", [160, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_width(backend: Backend, dtype: torch.dtype, hidden: int) -> None:
    shape = base(hidden)
    op = backend.make(shape, dtype)
    adapters = backend.adapters(shape, (8, 24), dtype)
    for group in backend.groups(list(TOLERANCE).index(dtype), hidden == 160):
        assert_conforms(op, batch(shape, group, [(1, 0), (1, None), (9, 1)], adapters), 0, group)


@pytest.mark.parametrize(
    "sites",
    [
        ("v_proj",),
        ("q_proj", "v_proj"),
        ("k_proj", "up_proj"),
        ("down_proj",),
        ("lm_head",),
        ("embed_tokens",),
    ],
)
def test_adapters_that_skip_sites(backend: Backend, sites: tuple[str, ...]) -> None:
    shape = base(64)
    op = backend.make(shape, torch.float32)
    adapters = [
        adapter(shape, 6, 0, torch.float32, sites, backend.device),
        adapter(shape, 9, 1, torch.float32, device=backend.device),
    ]
    for group in SiteGroup:
        assert_conforms(op, batch(shape, group, [(1, 0), (2, 1), (3, None), (5, 0)], adapters), 0, group)


def test_no_segments_cost_nothing(backend: Backend) -> None:
    shape = base(64)
    adapters = backend.adapters(shape, (4,), torch.float32)
    given = batch(shape, SiteGroup.OUT, [(4, None)], adapters)
    y = given.y.clone()
    backend.make(shape, torch.float32).plan(NO_SEGMENTS).add_lora(y, given.x, 0, SiteGroup.OUT)
    assert torch.equal(y, given.y)


def test_rows_do_not_depend_on_their_company(backend: Backend) -> None:
    """A row's result alone and among others agree as closely as its dtype allows."""
    shape = base(64)
    op = backend.make(shape, torch.float32)
    adapters = backend.adapters(shape, (8, 24, 5), torch.float32)
    together = batch(shape, SiteGroup.QKV, [(1, 0), (1, 1), (1, 2)], adapters)
    y = together.y.clone()
    op.plan(together.table).add_lora(y, together.x, 0, SiteGroup.QKV)
    for t, weights in enumerate(adapters):
        alone = together.y[t : t + 1].clone()
        op.plan(SegmentTable((Segment(0, 1, weights),))).add_lora(
            alone, together.x[t : t + 1], 0, SiteGroup.QKV
        )
        torch.testing.assert_close(alone[0], y[t], rtol=1e-6, atol=1e-6)
