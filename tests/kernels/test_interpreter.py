"""What Triton's interpreter gets wrong with bfloat16 is mended."""

# A kernel's arguments have the types that it is launched with, and its launch takes options besides.
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreter import DEVICE, RUNS_TRITON

pytestmark = pytest.mark.skipif(not RUNS_TRITON, reason="neither a CUDA device nor TRITON_INTERPRET=1")


@triton.jit
def _product(target, a, b):
    rows, columns = tl.arange(0, 16), tl.arange(0, 32)
    left = tl.load(a + rows[:, None] * 32 + columns)
    right = tl.load(b + columns[:, None] * 16 + rows)
    tl.store(target + rows[:, None] * 16 + rows, tl.dot(left, right))


@triton.jit
def _narrow(target, source):
    at = tl.arange(0, 512)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16))


def test_products_of_bfloat16_on_triton() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=rng).bfloat16() for shape in ((16, 32), (32, 16)))
    target = torch.empty(16, 16, device=DEVICE)
    _product[(1,)](target, a.to(DEVICE), b.to(DEVICE))
    torch.testing.assert_close(target.cpu(), a.float() @ b.float())


def test_rounding_to_bfloat16_on_triton() -> None:
    source = torch.randn(512, generator=torch.Generator().manual_seed(0))
    target = torch.empty(512, dtype=torch.bfloat16, device=DEVICE)
    _narrow[(1,)](target, source.to(DEVICE))
    assert torch.equal(target.cpu(), source.bfloat16())
