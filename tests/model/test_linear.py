"""The packed linear equals the plain one, and in float32 a row's result does not depend on its neighbours."""

import pytest
import torch
import torch.nn.functional as F

from model.config import Quantization
from model.linear.choice import choose_linear, make_linear
from model.linear.native.native_linear import NativeLinear, load_multiply
from model.linear.packed import PackedLinear, PlainLinear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
needs_native = pytest.mark.skipif(load_multiply() is None, reason="installed without a C++ compiler")
CPU = torch.device("cpu")


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 128])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_plain(rows: int, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if biased else None
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    y = make_linear(weight, bias)(x)
    assert y.is_contiguous()
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(y.float(), exact, atol=tolerance * 10, rtol=tolerance)


@needs_onednn
def test_a_float32_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = make_linear(torch.randn(512, 2048, generator=generator))
    x = torch.randn(70, 2048, generator=generator)
    together = linear(x)
    for start, stop in ((0, 1), (3, 5), (10, 43), (69, 70)):
        assert torch.equal(linear(x[start:stop]), together[start:stop])


def test_the_form_follows_the_weight() -> None:
    assert isinstance(make_linear(torch.zeros(4, 4, dtype=torch.float64)), PlainLinear)
    if torch.backends.mkldnn.is_available():
        assert isinstance(make_linear(torch.zeros(4, 4)), PackedLinear)


@needs_native
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 11, 12, 13, 40, 257])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (33, 100), (1, 4), (79, 1024)])
def test_native_equals_a_product_in_float64(rows: int, biased: bool, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    linear = make_linear(weight, bias, linear="native")
    assert isinstance(linear, NativeLinear)
    y = linear(x)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (y.dtype, y.shape, y.is_contiguous()) == (torch.bfloat16, exact.shape, True)
    torch.testing.assert_close(y.double(), exact, atol=1e-3, rtol=2**-8)


@needs_native
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_native_rows_do_not_depend_on_their_neighbours_nor_on_threads(quantization: Quantization) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(530, 2048, generator=generator).bfloat16()
    linear = make_linear(weight, None, quantization, "native")
    x = torch.randn(300, 2048, generator=generator).bfloat16()
    together, threads = linear(x), torch.get_num_threads()
    for start, stop in ((0, 1), (3, 5), (10, 43), (299, 300), (0, 299)):
        assert torch.equal(linear(x[start:stop]), together[start:stop])
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(linear(x), together)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_a_number_that_is_none_stays_in_its_row_and_its_column() -> None:
    weight = torch.ones(40, 8, dtype=torch.bfloat16)
    weight[33, 3] = float("inf")
    x = torch.ones(15, 8, dtype=torch.bfloat16)
    x[7, 2] = float("nan")
    y = make_linear(weight, linear="native")(x)
    assert y[7].isnan().all()
    others = y[[row for row in range(15) if row != 7]]
    assert others[:, 33].isinf().all()
    assert torch.equal(others[:, :33], torch.full((14, 33), 8.0, dtype=torch.bfloat16))


def test_weights_that_native_cannot_keep_take_torchs_form() -> None:
    assert not isinstance(make_linear(torch.zeros(4, 4), linear="native"), NativeLinear)
    assert not isinstance(make_linear(torch.zeros(4, 3, dtype=torch.bfloat16), linear="native"), NativeLinear)


def test_the_choice_is_a_form_that_can_multiply_here_or_a_reason() -> None:
    assert choose_linear("torch", torch.float32, CPU) == "torch"
    assert choose_linear("auto", torch.float32, CPU) == "torch"
    assert choose_linear("auto", torch.bfloat16, torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match="on a CPU, not on cuda: use auto"):
        choose_linear("native", torch.bfloat16, torch.device("cuda"))
    if load_multiply() is not None:
        assert choose_linear("native", torch.bfloat16, CPU) == "native"
        with pytest.raises(ValueError, match="use torch, or --dtype bfloat16"):
            choose_linear("native", torch.float32, CPU)
