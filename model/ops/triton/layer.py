"""Compute a layer between its matrices on a GPU: each consumer of a projection also adds the adapters' share.

A step of base rows runs the same kernels without that part. With adapters, each group's shrink runs on a second
stream beside the base projection. Every launch of a step has arguments that follow from its rows, its tiling and fixed
memory (see lora.ops.triton.op). So a step may be captured in a graph: `load` outside, `plan` and what follows inside,
the rotation's few operations with it. A rope of the kind "dynamic" reads lengths on the host and must not be
captured beyond the length of pretraining.
"""

# A kernel's own type is partly unknown.
# pyright: reportUnknownVariableType=false

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lora.ops.triton.device import DTYPES, launch
from lora.ops.triton.op import Expansion, TritonLora, TritonStep, tiling_of
from lora.segments import SegmentTable
from lora.target_modules import SiteGroup
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear.base import Linear
from model.ops.base import Heads
from model.ops.triton.heads import store_heads_expanded
from model.ops.triton.rowwise import gate_expanded, rms_norm
from model.rope import Rope, Rotation


class SideStream:
    """Forks from the main stream and joins it again; on a CPU one thing runs after the other.

    Under capture the fork becomes a branch of the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def beside(self, main: Callable[[], Tensor], aside: Callable[[], None]) -> Tensor:
        """What `main` returns. `aside` depends on nothing that `main` does; both are done for what comes next.

        Main's launches go first: a persistent grid would leave them no room until it is through.
        """
        if self._stream is None:
            aside()
            return main()
        stream = torch.cuda.current_stream()
        forked = stream.record_event()
        result = main()
        self._stream.wait_event(forked)
        with torch.cuda.stream(self._stream):
            aside()
        stream.wait_stream(self._stream)
        return result


class TritonOps:
    """LayerOps over `lora`, which also lays out a step's rows of the base. `dtype` is the model's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, lora: TritonLora) -> None:
        self._config, self.lora = config, lora
        self._rope = Rope(config.rope, config.head_dim, dtype, lora.device)
        self._side = SideStream(lora.device)

    def load(self, batch: ForwardBatch) -> Hashable:
        """See GraphOps."""
        rows = batch.token_ids.shape[0]
        self.lora.load(batch.segments, rows)
        table = batch.segments
        adapted = bool(table.segments), bool(batch.logit_segments.segments), table.adapts(SiteGroup.EMBEDDING)
        return tiling_of(batch.segments, rows), adapted, self.lora.generation

    def plan(self, batch: ForwardBatch, cache: KVCache) -> "TritonLayerStep":
        """See LayerOps."""
        lens = batch.query_lens, batch.context_lens, batch.prompt_lens
        rotation = self._rope.rotation(batch.positions, *lens)
        lora = self.lora.plan_rows(batch.segments, batch.token_ids.shape[0])
        return TritonLayerStep(
            self._config, cache, batch.slots, rotation, lora, self._side, batch.segments, batch.logit_segments
        )


@dataclass(frozen=True, slots=True)
class TritonLayerStep:
    """LayerStep."""

    config: ModelConfig
    cache: KVCache
    slots: Tensor
    rotation: Rotation
    lora: TritonStep
    side: SideStream
    segments: SegmentTable
    logit_segments: SegmentTable

    def embed(self, embedding: Tensor, token_ids: Tensor) -> Tensor:
        """See LayerStep."""
        x = embedding[token_ids]
        if self.segments.adapts(SiteGroup.EMBEDDING):
            self.lora.add_lora(x, token_ids, 0, SiteGroup.EMBEDDING)
        return x

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See LayerStep."""
        rows, n = x.shape
        out = x.new_empty(rows, n)
        block = 1 << (n - 1).bit_length()
        warps = min(16, max(1, block // 512))
        eps = self.config.rms_norm_eps
        launch(rms_norm, rows, out, x, weight, n, x.stride(0), eps, BLOCK=block, num_warps=warps)
        return out

    def store_heads(self, layer: int, project: Linear, x: Tensor, qk_norm: Tensor | None) -> Heads:
        """See LayerStep."""
        config = self.config
        y, given = self._projected(layer, SiteGroup.QKV, project, x)
        keys, values = self.cache.layer(layer)
        assert keys.stride() == values.stride(), "keys and values lie alike"
        half = config.head_dim // 2
        launch(
            store_heads_expanded,
            self.lora.programs,
            y,
            *(given.h, given.words, given.record_at, given.plane),
            *(config.num_heads, config.num_kv_heads, half),
            *(self.rotation.cos, self.rotation.signed_sin),
            *(y if qk_norm is None else qk_norm, config.rms_norm_eps),
            *(self.slots, keys, values, self.cache.block_size, *keys.stride()[:3]),
            HAS_NORM=qk_norm is not None,
            BLOCK_HALF=1 << (half - 1).bit_length(),
            **self._constants(given),
        )
        sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return Heads(*y.unflatten(1, (-1, config.head_dim)).split(sizes, dim=1))

    def gate(self, layer: int, project: Linear, x: Tensor) -> Tensor:
        """See LayerStep."""
        y, given = self._projected(layer, SiteGroup.GATE_UP, project, x)
        width = y.shape[1] // 2
        out = y.new_empty(y.shape[0], width)
        launch(
            gate_expanded,
            self.lora.programs,
            *(out, y, given.h, given.words, given.record_at, given.plane, width),
            BLOCK_COLUMNS=self.lora.tiling.columns,
            **self._constants(given),
        )
        return out

    def add(
        self, layer: int, group: SiteGroup, project: Linear, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """See LayerStep."""
        y, _ = self._projected(layer, group, project, x)
        self.lora.add(y, residual, layer, group)
        return y

    def head(self, project: Linear, x: Tensor) -> Tensor:
        """See LayerStep. Where all rows' logits are wanted the step's work is this one's, else it is laid out here."""
        if not self.logit_segments.segments:
            return project(x)
        lora = self.lora.op.plan_rows(self.logit_segments, len(x))
        return replace(self, lora=lora).add(0, SiteGroup.HEAD, project, x, None)

    def _projected(
        self, layer: int, group: SiteGroup, project: Linear, x: Tensor
    ) -> tuple[Tensor, Expansion]:
        """The base projection, and what expands h, which was shrunk beside it."""
        given = self.lora.expansion(layer, group)
        if not given.adapted:
            return project(x), given
        return self.side.beside(partial(project, x), partial(self.lora.shrink, x, layer, group)), given

    def _constants(self, given: Expansion) -> dict[str, object]:
        tiling = self.lora.tiling
        return {
            "DTYPE": DTYPES[self.lora.op.dtype],
            "SPLITS": given.splits,
            "ADAPTED": given.adapted,
            "BLOCK_ROWS": tiling.block_rows,
            "BLOCK_RANK": tiling.expand_rank,
            **tiling.launch_options,
        }
