"""The forward pass of the Llama family. What differs between families is a field of ModelConfig, or a weight
that is there or not. Knows no file and no request, and adapters only as segments of the batch's rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora.target_modules import SiteGroup
from model.attention.base import AttentionBackend, AttentionStep
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear.base import Linear
from model.ops.base import LayerOps, LayerStep
from model.parallel import Collective
from model.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share."""

    ops: LayerStep
    attention: AttentionStep
    collective: Collective | None

    def add(self, layer: int, group: SiteGroup, project: Linear, x: Tensor, residual: Tensor) -> Tensor:
        """As LayerStep.add, where the devices that share the model each have a part of the sum."""
        if self.collective is None:
            return self.ops.add(layer, group, project, x, residual)
        return self.collective.sum(self.ops.add(layer, group, project, x, None)).add_(residual)


class Model(Protocol):
    """Whatever computes a batch's logits: one device, or several of which this is the first."""

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """See Llama."""
        ...


class Llama:
    """One base model, over which rows of any mix of adapters run in one batch.

    With a collective it is this device's part of one: `config` says the part's heads and inner columns, and the head
    has the part's share of the vocabulary.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        attention: AttentionBackend,
        ops: LayerOps,
        collective: Collective | None = None,
    ) -> None:
        self.config = config
        self._collective = collective
        self._weights = weights
        self.attention = attention
        self.ops = ops

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache, attention: AttentionStep | None = None) -> Tensor:
        """Run the batch's rows, leaving their keys and values in `cache`; `attention` is the step's, where that is
        planned already.

        Returns [L, vocab] float32, the logits of `batch.logit_rows`; of several devices, the first has them.
        """
        attention = attention or self.attention.plan(batch, cache)
        step = _Step(self.ops.plan(batch, cache), attention, self._collective)
        x = step.ops.embed(self._weights.embedding, batch.token_ids)
        for number, layer in enumerate(self._weights.layers):
            x = self._layer(number, layer, x, step)
        x = step.ops.norm(x[batch.logit_rows], self._weights.norm)
        logits = step.ops.head(self._weights.head, x)
        if self._collective is not None and len(logits):
            logits = self._collective.gather(logits)
        return logits[:, : self.config.vocab_size].float()

    def _layer(self, number: int, layer: LayerWeights, x: Tensor, step: _Step) -> Tensor:
        """Run one layer: x [T, hidden] -> [T, hidden]."""
        ops = step.ops
        normed = ops.norm(x, layer.input_norm)
        heads = ops.store_heads(number, layer.qkv, normed, layer.qk_norm)
        attended = step.attention.attend(number, *heads)
        x = step.add(number, SiteGroup.OUT, layer.out, attended, residual=x)

        normed = ops.norm(x, layer.post_norm)
        gated = ops.gate(number, layer.gate_up, normed)
        return step.add(number, SiteGroup.DOWN, layer.down, gated, residual=x)
