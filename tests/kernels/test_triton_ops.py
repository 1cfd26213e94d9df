"""What the Triton LoRA op and its consumers promise beyond the conformance suites: memory, repetition, graphs."""

import gc
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lora.ops.triton.op import DISTINCT, SHARED, TritonLora, tiling_of
from lora.segments import NO_SEGMENTS, AdapterWeights, Segment, SegmentTable
from lora.target_modules import BaseShape, SiteGroup, SiteShape
from model.ops.triton.layer import TritonOps
from tests.conformance.test_layer_ops import BACKENDS, CONFIG, MARK, World, projecting
from tests.conformance.test_lora_op import adapter, assert_conforms, base, batch
from tests.kernels.interpreter import DEVICE, RUNS_TRITON

pytestmark = pytest.mark.skipif(not RUNS_TRITON, reason="neither a CUDA device nor TRITON_INTERPRET=1")

SHAPE = base(64)
F32 = torch.float32


def make(rank: int, seed: int = 0, shape: BaseShape = SHAPE) -> AdapterWeights:
    return adapter(shape, rank, seed, F32, device=DEVICE)


def deep(features: int) -> BaseShape:
    """One layer whose output projection is `features` deep and narrow, and whatever else."""
    small = SiteShape(32, 32)
    return BaseShape(1, (small, small, small, SiteShape(features, 48), small, small, small), (small, small))


@pytest.mark.parametrize(("features", "splits"), [(1008, 1), (1024, 2), (2048, 4), (4096, 8), (14336, 8)])
def test_depth_is_split_into_planes_that_nothing_zeroes(features: int, splits: int) -> None:
    shape = deep(features)
    op = TritonLora(shape, F32, DEVICE)
    adapters = [make(5, 0, shape), make(24, 1, shape)]
    given = batch(shape, SiteGroup.OUT, [(1, 0), (3, 1), (2, None)], adapters)
    op.h.fill_(torch.nan)
    assert op.splits(SiteGroup.OUT, SHARED) == splits
    assert_conforms(op, given, 0, SiteGroup.OUT)


def test_the_same_batch_gives_the_same_bits() -> None:
    shape = deep(4096)
    adapters = [make(16, 0, shape), make(24, 1, shape)]
    given = batch(shape, SiteGroup.OUT, [(1, 0), (3, 1)], adapters)
    results = []
    for _ in range(2):
        y = given.y.clone()
        TritonLora(shape, F32, DEVICE).plan(given.table).add_lora(y, given.x, 0, SiteGroup.OUT)
        results.append(y)
    assert torch.equal(*results)


def test_membership_may_change_from_step_to_step() -> None:
    op = TritonLora(SHAPE, F32, DEVICE)
    adapters = [make(rank, seed) for seed, rank in enumerate((8, 3, 40))]
    specs: list[list[tuple[int, int | None]]] = [
        [(1, 0), (1, 1)],
        [(1, 2), (2, None), (4, 0)],
        [(1, 1), (1, 0)],
        [(1, 0), (1, 1)],
    ]
    for spec in specs:
        assert_conforms(op, batch(SHAPE, SiteGroup.OUT, spec, adapters), 1, SiteGroup.OUT)


def test_a_loaded_table_is_not_sent_again() -> None:
    op = TritonLora(SHAPE, F32, DEVICE)
    weights = make(8)
    tables = [SegmentTable((Segment(0, stop, weights),)) for stop in (2, 2, 3)]
    op.load(tables[0], 2)
    words = op.words[:32].clone()
    op.words.zero_()
    op.load(tables[1], 2)
    assert not op.words.any()
    op.load(tables[2], 3)
    assert op.words[:32].any()
    assert not torch.equal(op.words[:32], words)


def test_memory_keeps_its_place_until_it_is_outgrown() -> None:
    op = TritonLora(SHAPE, F32, DEVICE)
    weights = make(128)
    op.load(SegmentTable((Segment(0, 2, weights),)), 2)
    places = op.words.data_ptr(), op.h.data_ptr()
    op.load(SegmentTable((Segment(0, 90, weights),)), 90)
    assert (op.words.data_ptr(), op.h.data_ptr(), op.generation) == (*places, 0)
    op.load(SegmentTable((Segment(0, 900, weights),)), 900)
    assert op.generation == 1
    assert op.h.numel() >= 8 * 900 * 3 * 128
    assert op.h.numel() % (8 * 16) == 0, (
        "a plane that begins unlike others would have the kernels compiled anew"
    )
    op.load(SegmentTable(tuple(Segment(row, row + 1, make(8, row)) for row in range(250))), 9000)
    assert op.generation == 1
    given = batch(SHAPE, SiteGroup.OUT, [(20, 0)], [weights])
    assert_conforms(op, given, 1, SiteGroup.OUT)


def test_an_adapters_table_goes_with_the_adapter() -> None:
    op = TritonLora(SHAPE, F32, DEVICE)
    kept, gone = make(8, 0), make(8, 1)
    op.load(SegmentTable((Segment(0, 1, kept), Segment(1, 2, gone))), 2)
    assert op.resident_tables == 2
    op.load(SegmentTable((Segment(0, 1, kept),)), 1)
    del gone
    gc.collect()
    assert op.resident_tables == 1


def test_an_adapter_of_another_dtype_is_refused_by_name() -> None:
    op = TritonLora(SHAPE, torch.bfloat16, DEVICE)
    with pytest.raises(ValueError, match=r"adapter digest-3 .*torch\.float32.*reads torch\.bfloat16"):
        op.plan(SegmentTable((Segment(0, 1, make(8, 3)),)))


def test_shapes_suit_their_steps() -> None:
    each = [make(8, seed) for seed in range(4)]
    distinct = SegmentTable(tuple(Segment(row, row + 1, one) for row, one in enumerate(each)))
    assert tiling_of(distinct, 4) is DISTINCT
    assert tiling_of(distinct, 8) is SHARED
    assert tiling_of(NO_SEGMENTS, 8) is SHARED


@dataclass(frozen=True, slots=True)
class SpacedCache:
    """A cache whose blocks lie apart, as in memory that holds other things between them."""

    keys: Tensor
    values: Tensor
    block_size: int

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def test_blocks_may_lie_apart_and_rows_may_be_in_no_block() -> None:
    world = World(BACKENDS["triton"], "mixed")
    size = world.cache.block_size
    memory = torch.full((2, len(world.cache.layer(0)[0]), 3, size, 2, 16), MARK, device=DEVICE)
    spaced = SpacedCache(memory[0, :, 1], memory[1, :, 1], size)
    ops = TritonOps(CONFIG, F32, TritonLora(CONFIG.base_shape(), F32, DEVICE))
    outside = torch.arange(len(world.slots)) % 3 == 1
    slots = torch.where(outside, -1, world.slots)
    given, _ = world.draw(SiteGroup.QKV)
    step = ops.plan(replace(world.batch, slots=slots.to(DEVICE)), spaced)  # pyright: ignore[reportArgumentType]
    heads = step.store_heads(1, projecting(given), given.x, None)
    for kept, stored in zip((spaced.keys, spaced.values), heads[1:], strict=True):
        rows = kept.flatten(0, 1)
        assert torch.equal(rows[world.slots[~outside]], stored[~outside])
        rows[world.slots[~outside]] = MARK
        assert (rows == MARK).all()
    assert (memory[:, :, [0, 2]] == MARK).all()
