"""Find the sequences that make a step raise, so that the step's others go on.

A step that raised is computed again in parts, each of which is waited for. So the error may have come when
the step was launched, or when its tokens were read from a device that runs behind.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import EngineStopped
from engine.runner.base import DeviceLost, StepExecutor, StepOutputs
from lora.adapter import BASE
from lora.segments import AdapterLease
from scheduler.plan import SequenceKey, Slice, SliceOutput, StepPlan
from scheduler.request import Request, SamplingParams

_PROBE = Request("fault-probe", (0,), BASE, SamplingParams(max_tokens=1, temperature=0, seed=0), (), 0.0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedComputation:
    """A plan whose launch raised."""

    error: Exception
    done: bool = True

    def outputs(self) -> StepOutputs:
        """Raise what the launch raised. See Computation."""
        raise self.error


class StepRetry:
    """Computes a plan again whose step raised: by halves, until the sequences at fault are alone.

    No other step may be under way, and no token pending. A part writes what the whole would have written, to
    blocks of its own sequences. What a sequence at fault has written is never committed, hence never shared.
    """

    def __init__(self, executor: StepExecutor, plan: StepPlan, lease: AdapterLease) -> None:
        """Compute `plan`, whose adapters `lease` holds, with `executor`."""
        self._executor, self._plan, self._lease = executor, plan, lease
        self._found: dict[SequenceKey, SliceOutput] = {}
        self._invalid: set[SequenceKey] = set()
        self._stuck: set[SequenceKey] = set()

    def run(self, error: Exception, sequences: int) -> StepOutputs:
        """Return the plan's outputs. `error` is what a step raised of so many sequences, the plan's among them.

        Raises EngineStopped if no sequence is at fault, since a step of none of them fails too; DeviceLost.
        """
        slices = self._plan.slices
        parts = _halves(slices) if len(slices) == sequences else [slices]
        while parts:
            failed = [part for part in parts if not self._try(part)]
            parts = [half for part in failed for half in _halves(part)]
        if not self._found:
            self._probe(error)
        faults = tuple(part.key for part in slices if part.key not in self._found)
        _log.error("%d sequences of a step of %d failed", len(faults), len(slices), exc_info=error)
        return StepOutputs(
            outputs=tuple(self._found.get(part.key, SliceOutput(None)) for part in slices),
            invalid=tuple(part.key for part in slices if part.key in self._invalid),
            faults=faults,
            stuck=tuple(part.key for part in slices if part.key in self._stuck),
        )

    def _try(self, part: Sequence[Slice]) -> bool:
        """Compute a part of the plan; False if it raised."""
        try:
            outputs = self._compute(StepPlan(tuple(part)))
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - as in EngineCore
            if len(part) == 1:
                _log.warning(
                    "sequence %d of request %s failed: %r", part[0].key.index, part[0].key.request_id, error
                )
            return False
        self._found.update(zip((each.key for each in part), outputs.outputs, strict=True))
        self._invalid.update(outputs.invalid)
        self._stuck.update(outputs.stuck)
        return True

    def _probe(self, error: Exception) -> None:
        """Compute one token of the base alone, in a block of a sequence that has failed, hence of no use."""
        key, block = SequenceKey(_PROBE.request_id, 0), self._plan.slices[0].block_table[-1]
        try:
            self._compute(StepPlan((Slice(key, _PROBE, (0,), 0, (block,), True, 0, (), False),)))
        except DeviceLost:
            raise
        except Exception as cause:  # noqa: BLE001 - no step can be computed, whatever the reason
            raise EngineStopped(cause) from error

    def _compute(self, plan: StepPlan) -> StepOutputs:
        """Compute some of the plan's sequences, or none, with what they need of its adapters."""
        weights = {ref.digest: self._lease.weights[ref.digest] for ref in plan.adapters}
        return self._executor.launch(plan, AdapterLease(weights, _keep)).outputs()


def _halves(slices: Sequence[Slice]) -> list[Sequence[Slice]]:
    """Halve the slices; a single one is at fault, and is not tried again."""
    middle = len(slices) // 2
    return [slices[:middle], slices[middle:]] if middle else []


def _keep() -> None:
    """Release nothing: the whole plan's lease does."""
