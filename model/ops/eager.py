"""Compute what lies between a layer's matrices one operation after another: a CPU's default."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.ops.base import LoraOp, LoraStep
from lora.target_modules import SiteGroup
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear.base import Linear
from model.ops.base import Heads
from model.ops.row_ops import HeadPlaces, RowOps, TorchRows
from model.rope import Rope

_TORCH = TorchRows()


class EagerOps:
    """LayerOps over any LoRA op and any arithmetic of rows. `dtype` and `device` are the model's."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        lora: LoraOp,
        rows: RowOps = _TORCH,
    ) -> None:
        self._config, self._lora, self._rows = config, lora, rows
        self._rope = Rope(config.rope, config.head_dim, dtype, device)

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "EagerStep":
        """See LayerOps."""
        lens = batch.query_lens, batch.context_lens, batch.prompt_lens
        rotation = self._rope.rotation(batch.positions, *lens)
        lora = self._lora.plan(batch.segments) if batch.segments.segments else None
        config = self._config
        places = HeadPlaces(cache, batch.slots, rotation, config.num_heads, config.rms_norm_eps)
        return EagerStep(config, self._rows, places, lora, self._head_step(batch, lora))

    def _head_step(self, batch: ForwardBatch, lora: LoraStep | None) -> LoraStep | None:
        if batch.logit_segments == batch.segments:
            return lora
        return self._lora.plan(batch.logit_segments) if batch.logit_segments.segments else None


@dataclass(frozen=True, slots=True)
class EagerStep:
    """LayerStep; `lora` is None in a step of base rows alone, `head_lora` where no adapter changes the head."""

    config: ModelConfig
    rows: RowOps
    places: HeadPlaces
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
        return self.rows.norm(x, weight, self.config.rms_norm_eps)

    def store_heads(self, layer: int, project: Linear, x: Tensor, qk_norm: Tensor | None) -> Heads:
        """See LayerStep."""
        y = self._adapted(project, x, layer, SiteGroup.QKV)
        heads = y.view(len(y), -1, self.config.head_dim)
        return self.rows.store_heads(heads, layer, qk_norm, self.places)

    def gate(self, layer: int, project: Linear, x: Tensor) -> Tensor:
        """See LayerStep."""
        return self.rows.silu_mul(self._adapted(project, x, layer, SiteGroup.GATE_UP))

    def add(
        self, layer: int, group: SiteGroup, project: Linear, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """See LayerStep."""
        y = self._adapted(project, x, layer, group)
        return y if residual is None else self.rows.add(residual, y)

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
