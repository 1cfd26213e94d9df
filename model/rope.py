"""Rotate queries and keys by position: rotary position embedding (Su et al., arXiv 2104.09864).

The frequencies of the kind "dynamic" depend on a sequence's length. As in transformers, each step rotates its own
rows by the length that the sequence has at the end of that step. Keys already in the cache stay as they were. So a
prompt beyond the length of pretraining equals transformers' when it runs in one step, and differs slightly when it
runs in chunks. Up to the length of pretraining all kinds are independent of chunking.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import RopeConfig


@dataclass(frozen=True, slots=True)
class Rotation:
    """One step's cos and sin, [T, 1, head_dim] each, in the model's dtype; sin is negative in its lower half."""

    cos: Tensor
    signed_sin: Tensor


class Rope:
    """Computes a step's rotation from its positions; tables of every position are not kept."""

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rope, self._head_dim, self._dtype = rope, head_dim, dtype
        self._inv_freq = inverse_frequencies(rope, head_dim).to(device)

    def rotation(
        self, positions: Tensor, query_lens: tuple[int, ...], context_lens: tuple[int, ...]
    ) -> Rotation:
        """Rotate rows at `positions` ([T]); the lens say which rows are one sequence's, and its length."""
        angles = positions[:, None].float() * self._frequencies(query_lens, context_lens)
        cos, sin = angles.cos(), angles.sin()
        return Rotation(self._doubled(cos, cos), self._doubled(-sin, sin))

    def _doubled(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat((low, high), dim=-1)[:, None].to(self._dtype)

    def _frequencies(self, query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Tensor:
        """Return [head_dim / 2], or [T, head_dim / 2] when some sequence has outgrown a dynamic rope."""
        rope = self._rope
        if rope.kind != "dynamic" or max(context_lens, default=0) <= rope.original_max_tokens:
            return self._inv_freq
        each = [dynamic_frequencies(rope, self._head_dim, length) for length in context_lens]
        rows = torch.stack(each).repeat_interleave(torch.tensor(query_lens), dim=0)
        return rows.to(self._inv_freq.device)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates each pair (x[i], x[i + head_dim / 2]) by its angle. x: [T, heads, head_dim]."""
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, dims=-1), rotation.signed_sin)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return [head_dim / 2] float32: the angle per position of each pair, up to the length of pretraining."""
    if rope.kind == "linear":
        return _unscaled(rope.theta, head_dim) / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, _unscaled(rope.theta, head_dim))
    return _unscaled(rope.theta, head_dim)


def dynamic_frequencies(rope: RopeConfig, head_dim: int, length_tokens: int) -> Tensor:
    """Return [head_dim / 2] float32 by NTK-aware scaling: theta grows with a sequence longer than pretraining's."""
    stretch = max(length_tokens, rope.original_max_tokens) / rope.original_max_tokens
    growth = rope.factor * stretch - (rope.factor - 1)
    return _unscaled(rope.theta * growth ** (head_dim / (head_dim - 2)), head_dim)


def _unscaled(theta: float, head_dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1's scheme)."""
    turns = rope.original_max_tokens * inv_freq / (2 * math.pi)  # of each pair over the pretraining length
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = smooth.clamp(0.0, 1.0)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq
