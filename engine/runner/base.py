"""Define the seams of a step's execution: what computes plans, and what draws tokens on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lora.segments import AdapterLease
from model.sampling.sample import SampleRow
from scheduler.plan import SequenceKey, SliceOutput, StepPlan


class Fetched(Protocol):
    """Drawn tokens on their way to the host."""

    @property
    def done(self) -> bool:
        """Whether `tokens` returns without waiting."""
        ...

    def tokens(self) -> tuple[list[int], list[int]]:
        """Wait for them: the rows' tokens, and the rows whose tokens mean nothing, their logits being no numbers."""
        ...


class DeviceSampler(Protocol):
    """Draws on a device, from memory that never moves: see model/sampling_device.py."""

    @property
    def tokens(self) -> Tensor:
        """[rows] int64 on the device: what the last `draw` drew."""
        ...

    def refill(self, rows: Sequence[SampleRow]) -> None:
        """Set the parameters of the first rows."""
        ...

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """Apply the rows' penalties, biases and bans to logits [L, vocab], in place."""
        ...

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """Draw a token for each row of logits; with `advance`, each row's next draw is for the position after."""
        ...

    def fetch(self, rows: int) -> Fetched:
        """Start the first rows' tokens on their way to the host."""
        ...

    def snapshot(self) -> object:
        """All that draws depend on and change."""
        ...

    def restore(self, state: Any) -> None:
        """Be as when the snapshot was taken."""
        ...


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """A plan's outputs, aligned with its slices. `broken` are the sequences whose logits were no numbers, as an
    adapter with wild weights can make them: their outputs mean nothing, the others' are sound."""

    outputs: tuple[SliceOutput, ...]
    broken: tuple[SequenceKey, ...]


class Computation(Protocol):
    """A launched plan."""

    @property
    def done(self) -> bool:
        """Whether `outputs` returns without waiting."""
        ...

    def outputs(self) -> StepOutputs:
        """Wait for the plan's outputs. What it raises ends the plan's requests."""
        ...


class StepExecutor(Protocol):
    """Computes steps: one process on one device, or a group of them."""

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """Begin to compute the plan, after what was launched before; a CPU has computed it when this returns.

        `lease` holds the plan's adapters until its outputs are there. At most one earlier launch has not been read by
        then. What it raises ends the plan's requests.
        """
        ...
