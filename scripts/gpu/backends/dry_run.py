"""Backends of a dry run: plain torch on a CPU, to show that the path is whole."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora.memory.page_writer import DirectWriter, PageWriter
from lora.ops.base import LoraOp
from lora.ops.grouped import GroupedLora
from lora.target_modules import BaseShape
from model.attention.base import AttentionStep, GraphAttention
from model.attention.torch_paged import TorchPagedAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.ops.base import GraphOps, LayerStep
from model.ops.eager import EagerOps
from model.sampling.sample import SampleRow, sample
from scripts.gpu.backends.base import Run, Sampler


class DryOps:
    """GraphOps over plain torch."""

    def __init__(self, ops: EagerOps) -> None:
        self._ops = ops

    def load(self, batch: ForwardBatch) -> Hashable:
        """See GraphOps."""
        return bool(batch.segments.segments)

    def plan(self, batch: ForwardBatch, cache: KVCache) -> LayerStep:
        """See LayerOps."""
        return self._ops.plan(batch, cache)


@dataclass
class DryStep:
    """ReservedStep: plans anew."""

    backend: TorchPagedAttention
    cache: KVCache
    step: AttentionStep | None = None

    def refill(self, batch: ForwardBatch) -> None:
        """See ReservedStep."""
        self.step = self.backend.plan(batch, self.cache)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep."""
        assert self.step is not None, "a reserved step is filled before it attends"
        return self.step.attend(layer, q, k, v)


class DryAttention(TorchPagedAttention):
    """GraphAttention in plain torch."""

    def reserve(self, rows: int, blocks: int, cache: KVCache) -> DryStep:
        """See GraphAttention."""
        return DryStep(self, cache)


class DrySampler:
    """Sampler by model/sampling.py."""

    def __init__(self) -> None:
        self._rows: tuple[SampleRow, ...] = ()

    def refill(self, rows: Sequence[SampleRow]) -> None:
        """See Sampler."""
        self._rows = tuple(rows)

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """Leave it to `draw`."""

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """See Sampler."""
        tokens = [drawn.token_id for drawn in sample(logits, self._rows[: len(logits)])]
        if advance:
            self._rows = tuple(replace(row, position=row.position + 1) for row in self._rows)
        return torch.tensor(tokens)


class DryRunBackends:
    """Backends in plain torch on the CPU."""

    device = torch.device("cpu")

    def lora(self, base: BaseShape, dtype: torch.dtype) -> LoraOp:
        """See DeviceBackends."""
        return GroupedLora()

    def ops(self, config: ModelConfig, dtype: torch.dtype) -> GraphOps:
        """See DeviceBackends."""
        return DryOps(EagerOps(config, dtype, self.device, self.lora(config.base_shape(), dtype)))

    def attentions(
        self, config: ModelConfig, dtype: torch.dtype
    ) -> Mapping[str, Callable[[], GraphAttention] | str]:
        """See DeviceBackends."""
        return {"torch": lambda: DryAttention(config), "flashinfer": "a dry run has no device"}

    def sampler(self, rows: int) -> Sampler:
        """See DeviceBackends."""
        return DrySampler()

    def poison(self, op: object) -> None:
        """Nothing is kept."""

    def record(self, run: Run) -> Run:
        """See DeviceBackends."""
        return run

    def times_ms(self, run: Run, count: int) -> list[float]:
        """See DeviceBackends."""
        times: list[float] = []
        for _ in range(count):
            began_s = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began_s))
        return times

    def page_writer(self) -> PageWriter:
        """See DeviceBackends."""
        return DirectWriter()

    def nodes(self, run: Run) -> int:
        """See DeviceBackends."""
        run()
        return 1

    def synchronize(self) -> None:
        """See DeviceBackends."""
