"""Compute what lies between a layer's matrices in plain torch, one operation after another: a CPU's default.

Rounding follows transformers' order.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.ops.base import LoraOp, LoraStep
from lora.target_modules import SiteGroup
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear.base import Linear
from model.ops.base import Heads
from model.rope import Rope, Rotation, rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x²) + eps) over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    x: [..., n] of any float dtype. The quotient is computed in float32 and rounded to x's dtype before the
    weight.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [T, 2n] -> [T, n], gate in the first n columns."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class EagerOps:
    """LayerOps over any LoRA op. `dtype` and `device` are the model's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, lora: LoraOp) -> None:
        self._config, self._lora = config, lora
        self._rope = Rope(config.rope, config.head_dim, dtype, device)

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "EagerStep":
        """See LayerOps."""
        lens = batch.query_lens, batch.context_lens, batch.prompt_lens
        rotation = self._rope.rotation(batch.positions, *lens)
        lora = self._lora.plan(batch.segments) if batch.segments.segments else None
        return EagerStep(self._config, cache, batch.slots, rotation, lora, self._head_step(batch, lora))

    def _head_step(self, batch: ForwardBatch, lora: LoraStep | None) -> LoraStep | None:
        if batch.logit_segments == batch.segments:
            return lora
        return self._lora.plan(batch.logit_segments) if batch.logit_segments.segments else None


@dataclass(frozen=True, slots=True)
class EagerStep:
    """LayerStep; `lora` is None in a step of base rows alone, `head_lora` where no adapter changes the head."""

    config: ModelConfig
    cache: KVCache
    slots: Tensor
    rotation: Rotation
    lora: LoraStep | None
    head_lora: LoraStep | None

    def embed(self, embedding: Tensor, token_ids: Tensor) -> Tensor:
        """See LayerStep."""
        x = embedding[token_ids]
        if self.lora is not None:
            self.lora.add_lora(x, token_ids, 0, SiteGroup.EMBEDDING)
        return x

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See LayerStep."""
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def store_heads(self, layer: int, project: Linear, x: Tensor, qk_norm: Tensor | None) -> Heads:
        """See LayerStep."""
        y = self._adapted(project, x, layer, SiteGroup.QKV)
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        heads = y.view(len(y), -1, self.config.head_dim)
        qk, v = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if qk_norm is not None:
            qk = self.norm(qk, qk_norm)
        q, k = torch.split(rotate(qk, self.rotation), [num_heads, num_kv_heads], dim=1)
        self.cache.write(layer, self.slots, k, v)
        return Heads(q, k, v)

    def gate(self, layer: int, project: Linear, x: Tensor) -> Tensor:
        """See LayerStep."""
        return silu_mul(self._adapted(project, x, layer, SiteGroup.GATE_UP))

    def add(
        self, layer: int, group: SiteGroup, project: Linear, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """See LayerStep."""
        y = self._adapted(project, x, layer, group)
        return y if residual is None else residual + y

    def head(self, project: Linear, x: Tensor) -> Tensor:
        """See LayerStep."""
        y = project(x)
        if self.head_lora is not None:
            self.head_lora.add_lora(y, x, 0, SiteGroup.HEAD)
        return y

    def _adapted(self, project: Linear, x: Tensor, layer: int, group: SiteGroup) -> Tensor:
        y = project(x)
        if self.lora is not None:
            self.lora.add_lora(y, x, layer, group)
        return y
