"""The seam between what is checked and timed, and the checks: a device's kernels, or a rehearsal's plain torch."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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

Run = Callable[[], None]


class Sampler(Protocol):
    """See model.sampling.device.DeviceSampler."""

    def refill(self, rows: Sequence[SampleRow]) -> None: ...

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None: ...

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor: ...


class Backends(Protocol):
    """Everything that runs on one device."""

    @property
    def device(self) -> torch.device:
        """Where."""
        ...

    def lora(self, base: BaseShape, dtype: torch.dtype) -> LoraOp:
        """The LoRA arithmetic alone."""
        ...

    def ops(self, config: ModelConfig, dtype: torch.dtype) -> GraphOps:
        """A layer's arithmetic, the adapters' part within it."""
        ...

    def attentions(
        self, config: ModelConfig, dtype: torch.dtype
    ) -> Mapping[str, Callable[[], GraphAttention] | str]:
        """Every attention by name; a word on why, where it is not there."""
        ...

    def sampler(self, rows: int) -> Sampler:
        """Draws for up to `rows` rows."""
        ...

    def soil(self, op: object) -> None:
        """Fill with NaN what the op keeps between calls, and the memory that its next results may be given."""
        ...

    def record(self, run: Run) -> Run:
        """A function that launches again what `run` launches."""
        ...

    def times_ms(self, run: Run, count: int) -> list[float]:
        """How long each of `count` runs takes on the device, one after another."""
        ...

    def stowage(self) -> PageWriter:
        """How adapters come into device memory."""
        ...

    def nodes(self, run: Run) -> int:
        """Nodes of the graph of `run`, which ran before."""
        ...

    def synchronize(self) -> None:
        """Wait for the device. Raises what went wrong there."""
        ...


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
        """`draw` does that."""

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """See Sampler."""
        tokens = [drawn.token_id for drawn in sample(logits, self._rows[: len(logits)])]
        if advance:
            self._rows = tuple(replace(row, position=row.position + 1) for row in self._rows)
        return torch.tensor(tokens)


class Dry:
    """Backends of a rehearsal on the CPU."""

    device = torch.device("cpu")

    def lora(self, base: BaseShape, dtype: torch.dtype) -> LoraOp:
        """See Backends."""
        return GroupedLora()

    def ops(self, config: ModelConfig, dtype: torch.dtype) -> GraphOps:
        """See Backends."""
        return DryOps(EagerOps(config, dtype, self.device, self.lora(config.base_shape(), dtype)))

    def attentions(
        self, config: ModelConfig, dtype: torch.dtype
    ) -> Mapping[str, Callable[[], GraphAttention] | str]:
        """See Backends."""
        return {"torch": lambda: DryAttention(config), "flashinfer": "a rehearsal has no device"}

    def sampler(self, rows: int) -> Sampler:
        """See Backends."""
        return DrySampler()

    def soil(self, op: object) -> None:
        """Nothing is kept."""

    def record(self, run: Run) -> Run:
        """See Backends."""
        return run

    def times_ms(self, run: Run, count: int) -> list[float]:
        """See Backends."""
        times = []
        for _ in range(count):
            began_s = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began_s))
        return times

    def stowage(self) -> PageWriter:
        """See Backends."""
        return DirectWriter()

    def nodes(self, run: Run) -> int:
        """See Backends."""
        run()
        return 1

    def synchronize(self) -> None:
        """See Backends."""
