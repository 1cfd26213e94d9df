"""Rotation equals transformers' own rotary modules, for every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.config_file import parse_config
from model.rope import Rope, rotate
from tests.model.test_config_file import LLAMA

HEAD_DIM = 16
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def theirs(kind: str, positions: Tensor, x: Tensor) -> Tensor:
    """x: [T, heads, head_dim]"""
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=64, rope_parameters=dict(KINDS[kind]))
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    rotated, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)
    return rotated[0]


def ours(
    kind: str, positions: Tensor, x: Tensor, query_lens: tuple[int, ...], context_lens: tuple[int, ...]
) -> Tensor:
    fields = {**LLAMA, "head_dim": HEAD_DIM, "max_position_embeddings": 64, "rope_parameters": KINDS[kind]}
    rope = Rope(parse_config(fields, {}).rope, HEAD_DIM, x.dtype, x.device)
    return rotate(x, rope.rotation(positions, query_lens, context_lens))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("length", [1, 40, 64, 65, 300])
def test_rotation_equals_transformers(kind: str, length: int) -> None:
    x = torch.randn(length, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)
    found = ours(kind, positions, x, (length,), (length,))
    torch.testing.assert_close(found, theirs(kind, positions, x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_sequence_of_a_batch_has_its_own_length(kind: str) -> None:
    """A decode row at position 99, a prompt of 70 and one of 5, in one batch."""
    spans = ((99, 100), (0, 70), (0, 5))
    positions = torch.cat([torch.arange(*span) for span in spans])
    x = torch.randn(len(positions), 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    together = ours(kind, positions, x, (1, 70, 5), (100, 70, 5))
    for span, part in zip(spans, together.split((1, 70, 5)), strict=True):
        start = {100: 0, 70: 1, 5: 71}[span[1]]
        expected = theirs(kind, torch.arange(*span), x[start : start + span[1] - span[0]])
        torch.testing.assert_close(part, expected, atol=2e-5, rtol=1e-5)


def test_a_dynamic_rope_goes_by_the_prompt_however_it_is_cut() -> None:
    """A prompt of 70 in chunks of 30 and 40, then three tokens that are computed again in one step."""
    x = torch.randn(73, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    fields = {
        **LLAMA,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "rope_parameters": KINDS["dynamic"],
    }
    rope = Rope(parse_config(fields, {}).rope, HEAD_DIM, x.dtype, x.device)
    spans = ((0, 30), (30, 70), (70, 73))
    found = torch.cat(
        [
            rotate(x[start:stop], rope.rotation(torch.arange(start, stop), (stop - start,), (stop,), (70,)))
            for start, stop in spans
        ]
    )
    expected = [theirs("dynamic", torch.arange(70), x[:70])]
    expected += [theirs("dynamic", torch.tensor([at]), x[at : at + 1]) for at in range(70, 73)]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)


def test_bfloat16_rounds_as_transformers_does() -> None:
    x = torch.randn(30, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = ours("llama3", torch.arange(30), x, (30,), (30,))
    torch.testing.assert_close(found, theirs("llama3", torch.arange(30), x), atol=2e-2, rtol=2e-2)
