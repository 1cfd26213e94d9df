"""The sampling kernel as an H100 would run it."""

import pytest
import torch

from model.sampling.device import DeviceSampler
from model.sampling.sample import SampleRow
from tests.kernels.compiled import COMPILES, pretended_h100

pytestmark = pytest.mark.skipif(not COMPILES, reason="the interpreter is on: nothing compiles")


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [128_256, 32_000])
def test_one_launch_with_wide_loads_and_no_spills(vocab: int) -> None:
    sampler = DeviceSampler(128, torch.device("cpu"))
    sampler.refill([SampleRow(top_p=0.9)] * 128)
    logits = torch.empty(128, vocab, device="meta")
    with pretended_h100() as launches:
        sampler.draw(logits)
        sampler.draw(logits, advance=True)
    assert [launch.grid for launch in launches] == [(128, 1, 1)] * 2
    for launch in launches:
        assert launch.spilled_bytes == 0
        assert launch.count("LDG.E.128") > 0
        assert launch.blocks_per_multiprocessor >= 1
