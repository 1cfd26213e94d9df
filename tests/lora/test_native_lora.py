"""What the compiled LoRA arithmetic promises beyond its seam: one answer for a row in any company, rounded once."""

import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lora.ops.native.library import load_add_lora
from lora.ops.native.native_lora import NativeLora
from lora.segments import AdapterWeights, GroupWeights, Segment, SegmentTable, SitePart
from lora.target_modules import SiteGroup
from tests.conformance.test_lora_op import adapter, base

ADD = load_add_lora()
F32, BF16 = torch.float32, torch.bfloat16
needs_library = pytest.mark.skipif(ADD is None, reason="the project was installed without a compiler")


def test_the_code_is_compiled_where_there_is_a_compiler() -> None:
    assert ADD is not None or shutil.which("g++") is None, "install the project: scripts/setup dev"


def added(y: Tensor, x: Tensor, segments: Sequence[Segment], group: SiteGroup = SiteGroup.QKV) -> Tensor:
    """Return y with the segments' updates."""
    assert ADD is not None
    weights = segments[0].adapter.groups[0, group]
    y = y.clone()
    NativeLora(ADD, weights.A.dtype).plan(SegmentTable(tuple(segments))).add_lora(y, x, 0, group)
    return y


@needs_library
@pytest.mark.parametrize("hidden", [40, 64, 272])  # 40: columns that fill no vector are left over
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"), [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)], ids=str
)
def test_a_row_is_the_same_to_the_bit_alone_and_in_company(
    hidden: int, dtype: torch.dtype, lora_dtype: torch.dtype
) -> None:
    shape = base(hidden)
    adapters = [adapter(shape, rank, seed, lora_dtype) for seed, rank in enumerate((8, 128, 5, 33))]
    rng = torch.Generator().manual_seed(hidden)
    lengths = (1, 1, 7, 2, 30, 1, 5, 1)
    rows = sum(lengths)
    x = torch.randn(rows, hidden, generator=rng).to(dtype)
    y = torch.randn(rows, shape.group_out(SiteGroup.QKV), generator=rng).to(dtype)
    segments, start = [], 0
    for at, length in enumerate(lengths):
        segments.append(Segment(start, start + length, adapters[at % len(adapters)]))
        start += length
    together = added(y, x, segments)
    for segment in segments:
        for t in range(segment.start, segment.stop):
            alone = added(y[t : t + 1], x[t : t + 1], [Segment(0, 1, segment.adapter)])
            assert torch.equal(alone[0], together[t]), f"row {t}"


@needs_library
@pytest.mark.parametrize("cut", [1, 3, 64, 99])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_prompt_is_the_same_to_the_bit_however_it_is_cut(cut: int, dtype: torch.dtype) -> None:
    shape, rows = base(64), 130
    weights = adapter(shape, 24, 3, dtype)
    rng = torch.Generator().manual_seed(cut)
    x = torch.randn(rows, 64, generator=rng).to(dtype)
    y = torch.randn(rows, shape.group_out(SiteGroup.QKV), generator=rng).to(dtype)
    whole = added(y, x, [Segment(0, rows, weights)])
    first = added(y[:cut], x[:cut], [Segment(0, cut, weights)])
    second = added(y[cut:], x[cut:], [Segment(0, rows - cut, weights)])
    assert torch.equal(whole, torch.cat((first, second)))


@needs_library
def test_sums_are_rounded_as_torch_rounds_them() -> None:
    """An adapter that adds given numbers to zeros: ties, infinities and numbers that are none among them."""
    rng = torch.Generator().manual_seed(5)
    special = torch.tensor(
        [0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, -3.4e38, 1e-40, torch.inf, -torch.inf, torch.nan]
    )
    numbers = torch.cat((special, torch.randn(70, generator=rng)))
    columns = len(numbers)
    A = torch.zeros(1, 32)
    A[0, 0] = 1
    part = SitePart(0, 1, 0, columns, numbers[None].contiguous())
    weights = AdapterWeights("digest", {(0, SiteGroup.OUT): GroupWeights(A, torch.ones(1), (part,))})
    x, y = torch.zeros(1, 32, dtype=BF16), torch.zeros(1, columns, dtype=BF16)
    x[0, 0] = 1
    found = added(y, x, [Segment(0, 1, weights)], SiteGroup.OUT)
    torch.testing.assert_close(found[0], numbers.to(BF16), rtol=0, atol=0, equal_nan=True)
