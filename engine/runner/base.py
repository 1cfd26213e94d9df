"""Define the seams of a step's execution: what computes plans, replays steps, and draws tokens on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import AcceleratorError, Tensor

from engine.errors import EngineError, StepFailed, StructureFailed
from engine.runner.input_batch import InputBatch
from lora.segments import AdapterLease, SegmentTable
from model.sampling.sample import SampleRow
from scheduler.plan import SequenceKey, SliceOutput, StepPlan

DeviceLost = AcceleratorError
"""What a device raises that computes nothing more in this process, such as after an assertion in a kernel."""

_INVALID_LOGITS = StepFailed(
    "the model's logits were NaN or infinite: check the weights of the adapter and the base", is_own=True
)
_FAULT = StepFailed("the request's part of a step failed; the server's log has the cause", is_own=True)
_STUCK = StructureFailed()


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """A plan's outputs, aligned with its slices.

    `invalid` are the sequences whose logits were NaN or infinite, as an adapter with wild weights can make them.
    `faults` are those that could not be computed at all, `stuck` those whose grammar leaves no token to draw. The
    outputs of all three mean nothing; the others' are sound.
    """

    outputs: tuple[SliceOutput, ...]
    invalid: tuple[SequenceKey, ...]
    faults: tuple[SequenceKey, ...] = ()
    stuck: tuple[SequenceKey, ...] = ()

    @property
    def failed(self) -> tuple[tuple[tuple[SequenceKey, ...], EngineError], ...]:
        """Return the sequences whose outputs mean nothing, each kind with the error that ends them."""
        return (self.faults, _FAULT), (self.invalid, _INVALID_LOGITS), (self.stuck, _STUCK)


class Computation(Protocol):
    """A launched plan."""

    @property
    def done(self) -> bool:
        """Whether `outputs` returns without waiting."""
        ...

    def outputs(self) -> StepOutputs:
        """Wait for the plan's outputs.

        If it raises, the plan is computed again in parts to find the sequences at fault. But an EngineError ends all
        of the plan's requests at once, and DeviceLost the engine.
        """
        ...


class StepExecutor(Protocol):
    """Computes steps, on one device or on several."""

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """Begin to compute the plan, after what was launched before; a CPU has computed it when this returns.

        `lease` holds the plan's adapters until its outputs are there. At most one earlier launch has not been read by
        then. What it raises is treated as what `outputs` raises.
        """
        ...


class StepGraphs(Protocol):
    """Replays steps that were captured before."""

    def takes(self, inputs: InputBatch) -> bool:
        """Return whether `run` computes the step."""
        ...

    def run(self, inputs: InputBatch, segments: SegmentTable) -> None:
        """Launch the step: its tokens are drawn into the sampler's first rows."""
        ...


class DrawnTokens(Protocol):
    """Drawn tokens on their way to the host."""

    @property
    def done(self) -> bool:
        """Whether `tokens` returns without waiting."""
        ...

    def tokens(self) -> tuple[list[int], list[int]]:
        """Wait for the rows' tokens, and the rows whose logits were NaN or infinite, whose tokens mean nothing."""
        ...


class StepSampler(Protocol):
    """Draws a step's tokens on a device, from memory that never moves; DeviceSampler of model is one."""

    @property
    def tokens(self) -> Tensor:
        """What the last `draw` drew: [rows] int64 on the device."""
        ...

    def refill(self, rows: Sequence[SampleRow]) -> None:
        """Set the parameters of the first rows."""
        ...

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """Apply the rows' penalties, biases, bans and masks to logits [L, vocab], in place."""
        ...

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """Draw a token for each row of logits; with `advance`, each row's next draw is for the position after."""
        ...

    def fetch(self, rows: int) -> DrawnTokens:
        """Start to copy the first rows' tokens to the host."""
        ...

    def snapshot(self) -> object:
        """Copy all that draws depend on and change."""
        ...

    def restore(self, state: Any) -> None:
        """Set all of that to what the snapshot holds."""
        ...
