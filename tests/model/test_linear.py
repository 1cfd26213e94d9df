"""The packed linear equals the plain one, and in float32 a row's result does not depend on its neighbours."""

import pytest
import torch
import torch.nn.functional as F

from model.linear import PackedLinear, PlainLinear, make_linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


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
