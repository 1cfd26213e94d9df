"""Rotate queries and keys by position: rotary position embedding (Su et al., arXiv 2104.09864).

The frequencies of the kind "dynamic" depend on a sequence's length. As in transformers, a prompt's rows are rotated by
the whole prompt's length. Each later row goes by the length that the sequence has with it. Keys already in the cache
stay as they were. So a row's rotation follows from its position and the prompt's length, however the steps are cut.
"""

import math
from dataclasses import dataclass
from typing import cast

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
        self,
        positions: Tensor,
        query_lens: tuple[int, ...],
        context_lens: tuple[int, ...],
        prompt_lens: tuple[int, ...] = (),
    ) -> Rotation:
        """Rotate rows at `positions` ([T]); the lens, as ForwardBatch's, say whose rows they are, and its length."""
        frequencies = self._inv_freq
        if self._rope.kind == "dynamic":
            longest = max((*context_lens, *prompt_lens), default=0)
            if longest > self._rope.original_max_tokens:
                frequencies = self._dynamic(positions, query_lens, prompt_lens or context_lens)
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return Rotation(self._doubled(cos, cos), self._doubled(-sin, sin))

    def _doubled(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat((low, high), dim=-1)[:, None].to(self._dtype)

    def _dynamic(self, positions: Tensor, query_lens: tuple[int, ...], lens: tuple[int, ...]) -> Tensor:
        """Return [T, head_dim / 2]: a row within its sequence's length goes by that, one beyond it by its own."""
        rows = torch.tensor(lens).repeat_interleave(torch.tensor(query_lens))
        lengths = torch.maximum(rows, positions.cpu()[: len(rows)] + 1)
        known, which = cast(tuple[Tensor, Tensor], lengths.unique(return_inverse=True))
        each = [dynamic_frequencies(self._rope, self._head_dim, int(length)) for length in known]
        return torch.stack(each)[which].to(self._inv_freq.device)


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
