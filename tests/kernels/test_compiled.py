"""The harness itself: what it compiles, and what it says of it."""

# A kernel's arguments have the types that it is launched with, and its launch takes options besides.
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.compiled import COMPILES, pretended_h100

pytestmark = pytest.mark.skipif(not COMPILES, reason="the interpreter is on: nothing compiles")


@triton.jit
def _copy(target, source, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def _product(target, a, b, M: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, 64)
    left = tl.load(a + rows[:, None] * 64 + columns)
    right = tl.load(b + columns[:, None] * 64 + columns)
    tl.store(target + rows[:, None] * 64 + columns, tl.dot(left, right))


def test_a_launch_is_written_down_as_it_was_made() -> None:
    source = torch.empty(1024)
    with pretended_h100() as launches:
        _copy[(1, 2)](source, source, 1024, BLOCK=512, num_warps=4)
    (launch,) = launches
    assert (launch.name, launch.grid, launch.num_warps) == ("_copy", (1, 2, 1), 4)
    assert launch.arguments[:3] == ((source.data_ptr(), torch.float32, (1024,)),) * 2 + (1024,)
    assert launch.spilled_bytes == 0
    assert 0 < launch.registers <= 64
    assert launch.blocks_per_multiprocessor == 16


def test_loads_are_as_wide_as_the_arguments_allow() -> None:
    source = torch.empty(1024)
    with pretended_h100() as launches:
        _copy[(1,)](source, source, 1024, BLOCK=512, num_warps=4)
        _copy[(1,)](source, source, 1023, BLOCK=512, num_warps=4)
        _copy[(1,)](source, source[1:], 1024, BLOCK=512, num_warps=4)
    assert [launch.count("LDG.E.128") > 0 for launch in launches] == [True, False, False]


def test_products_of_64_rows_take_the_wide_tensor_core_instruction() -> None:
    matrix = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    with pretended_h100() as launches:
        _product[(1,)](torch.empty(64, 64), matrix, matrix, M=64, num_warps=4)
        _product[(1,)](torch.empty(64, 64), matrix, matrix, M=16, num_warps=4)
    assert launches[0].count("HGMMA") > 0
    assert launches[1].count("HGMMA") == 0
    assert launches[1].count("HMMA") > 0


def test_a_context_lists_its_own_launches() -> None:
    source = torch.empty(1024)
    listed = []
    for _ in range(2):
        with pretended_h100() as launches:
            _copy[(1,)](source, source, 1024, BLOCK=512, num_warps=4)
        listed.append(len(launches))
    assert listed == [1, 1]
