"""The seam between the checks and what is checked and timed: a device's kernels, or a dry run's plain torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lora.memory.page_writer import PageWriter
from lora.ops.base import LoraOp
from lora.target_modules import BaseShape
from model.attention.base import GraphAttention
from model.config import ModelConfig
from model.ops.base import GraphOps
from model.sampling.sample import SampleRow

Run = Callable[[], None]


class Sampler(Protocol):
    """Draws tokens on the device; see DeviceSampler in model."""

    def refill(self, rows: Sequence[SampleRow]) -> None:
        """Take the rows to draw for."""
        ...

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """Apply in place what depends on the tokens before."""
        ...

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """Draw a token for each row; with `advance` the next ones are for the next position."""
        ...


class DeviceBackends(Protocol):
    """Everything that runs on one device."""

    @property
    def device(self) -> torch.device:
        """Where."""
        ...

    def lora(self, base: BaseShape, dtype: torch.dtype) -> LoraOp:
        """Make the LoRA arithmetic alone."""
        ...

    def ops(self, config: ModelConfig, dtype: torch.dtype) -> GraphOps:
        """Make a layer's arithmetic, the adapters' part within it."""
        ...

    def attentions(
        self, config: ModelConfig, dtype: torch.dtype
    ) -> Mapping[str, Callable[[], GraphAttention] | str]:
        """Name every attention and how it is made; where it is missing, say why."""
        ...

    def sampler(self, rows: int) -> Sampler:
        """Make a sampler of up to `rows` rows."""
        ...

    def poison(self, op: object) -> None:
        """Fill with NaN what the op keeps between calls, and the memory that its next results may be given."""
        ...

    def record(self, run: Run) -> Run:
        """Record what `run` launches; return what launches it again."""
        ...

    def times_ms(self, run: Run, count: int) -> list[float]:
        """Time each of `count` runs on the device, one after another."""
        ...

    def page_writer(self) -> PageWriter:
        """Choose how adapters come into device memory."""
        ...

    def nodes(self, run: Run) -> int:
        """Count the nodes of the graph of `run`, which ran before."""
        ...

    def synchronize(self) -> None:
        """Wait for the device. Raises what went wrong there."""
        ...
