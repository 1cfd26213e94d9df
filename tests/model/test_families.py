"""Every family equals transformers, token for token in float32 and within rounding in bfloat16."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.driver import Driver
from tests.oracles import hf

PROMPT = torch.randint(3, 320, (41,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module", params=list(hf.FAMILIES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    model = hf.build(request.param)
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_logits_equal_transformers(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    oracle, folder = checkpoint
    assert relative(Driver(folder).logits(PROMPT), hf.logits(oracle, PROMPT)) < 1e-5


def test_greedy_tokens_equal_transformers(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    oracle, folder = checkpoint
    assert Driver(folder).greedy(PROMPT, 24) == hf.greedy(oracle, PROMPT, 24)


def test_short_prompt_equals_transformers(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    oracle, folder = checkpoint
    assert Driver(folder).greedy(PROMPT[:1], 12) == hf.greedy(oracle, PROMPT[:1], 12)


def test_chunked_prefill_equals_whole(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    _, folder = checkpoint
    driver = Driver(folder)
    longest = min(len(PROMPT), driver.model.config.rope.original_max_tokens)
    prompt = PROMPT[:longest]
    whole = driver.logits(prompt)
    for chunk in (1, 5, 16):
        assert relative(driver.logits(prompt, chunk), whole) < 1e-5


def test_bfloat16_is_near_float32(checkpoint: tuple[PreTrainedModel, Path]) -> None:
    """Our bf16 error is of the size of transformers' own."""
    oracle, folder = checkpoint
    exact = hf.logits(oracle, PROMPT)
    theirs = hf.logits(type(oracle).from_pretrained(folder, dtype=torch.bfloat16), PROMPT)
    ours = Driver(folder, torch.bfloat16).logits(PROMPT)
    allowed = 1.5 * (theirs - exact).square().mean().sqrt()
    assert (ours - exact).square().mean().sqrt() < allowed
    assert relative(ours, exact) < 0.1
