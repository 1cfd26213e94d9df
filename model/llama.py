"""The forward pass of the Llama family. What differs between families is a field of ModelConfig, or a weight
that is there or not. Knows no file and no request, and adapters only as segments of the batch's rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.ops.base import LoraOp
from lora.sites import SiteGroup
from model.attention.base import AttentionBackend, AttentionStep
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import rms_norm, silu_mul
from model.linear import Linear
from model.rope import Rope, Rotation, rotate
from model.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share."""

    batch: ForwardBatch
    rotation: Rotation
    attention: AttentionStep


class Llama:
    """One base model, over which rows of any mix of adapters run in one batch."""

    def __init__(
        self, config: ModelConfig, weights: Weights, attention: AttentionBackend, lora: LoraOp
    ) -> None:
        self.config = config
        self._weights = weights
        self._attention = attention
        self._lora = lora
        embedding = weights.embedding
        self._rope = Rope(config.rope, config.head_dim, embedding.dtype, embedding.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Run the batch's rows, leaving their keys and values in `cache`.

        Returns [L, vocab] float32, the logits of `batch.logit_rows`.
        """
        rotation = self._rope.rotation(batch.positions, batch.query_lens, batch.context_lens)
        step = _Step(batch, rotation, self._attention.plan(batch, cache))
        x = self._weights.embedding[batch.token_ids]
        for number, layer in enumerate(self._weights.layers):
            x = self._layer(number, layer, x, step)
        x = self._norm(x[batch.logit_rows], self._weights.norm)
        return self._weights.head(x).float()

    def _layer(self, number: int, layer: LayerWeights, x: Tensor, step: _Step) -> Tensor:
        """x: [T, hidden] -> [T, hidden]"""
        normed = self._norm(x, layer.input_norm)
        qkv = self._project(layer.qkv, normed, step, number, SiteGroup.QKV)
        attended = self._attend(number, layer, qkv, step)
        x = x + self._project(layer.out, attended, step, number, SiteGroup.OUT)

        normed = self._norm(x, layer.post_norm)
        gate_up = self._project(layer.gate_up, normed, step, number, SiteGroup.GATE_UP)
        return x + self._project(layer.down, silu_mul(gate_up), step, number, SiteGroup.DOWN)

    def _attend(self, number: int, layer: LayerWeights, qkv: Tensor, step: _Step) -> Tensor:
        """qkv: [T, fused q, k and v] -> [T, heads * head_dim]"""
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        qk, v = qkv.unflatten(1, (-1, self.config.head_dim)).split(
            (num_heads + num_kv_heads, num_kv_heads), dim=1
        )
        if layer.qk_norm is not None:
            qk = self._norm(qk, layer.qk_norm)
        q, k = rotate(qk, step.rotation).split((num_heads, num_kv_heads), dim=1)
        return step.attention.attend(number, q, k, v)

    def _project(self, linear: Linear, x: Tensor, step: _Step, number: int, group: SiteGroup) -> Tensor:
        """The base projection of every row, plus each adapter's own on its rows."""
        y = linear(x)
        if step.batch.segments.segments:
            self._lora.add_lora(y, x, step.batch.segments, number, group)
        return y

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps)
