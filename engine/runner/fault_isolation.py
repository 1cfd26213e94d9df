"""Find the sequences that make a step raise, so that the step's others go on.

Only where a launch has computed its plan when it returns, and leaves nothing behind that a later one reads: one
process on a CPU. On an accelerator an error may be told later than the step that it belongs to, and several processes
may have come apart by then.
"""

import logging
from collections import deque

from engine.errors import EngineError
from engine.runner.base import Computation, StepExecutor, StepOutputs
from engine.runner.executor import FinishedComputation
from lora.segments import AdapterLease
from scheduler.plan import SequenceKey, Slice, SliceOutput, StepPlan

_MOST_RETRIES = 64  # finds 5 sequences at fault among 64 others, and ends if every one is
_log = logging.getLogger(__name__)


class IsolatingExecutor:
    """StepExecutor that computes a plan in parts if the whole raises, by halves, until the fault's sequences are found.

    A part writes what the whole would have written, to blocks of its own sequences. What a sequence at fault has
    written is never committed, hence never shared.
    """

    def __init__(self, executor: StepExecutor) -> None:
        """Compute with `executor`, whose launches have computed their plan when they return."""
        self._executor = executor

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """See StepExecutor. Raises only if no sequence of the plan could be computed."""
        try:
            return self._executor.launch(plan, lease)
        except EngineError:
            raise
        except Exception as error:  # noqa: BLE001 - as in EngineCore
            _log.warning(
                "a step of %d sequences failed: it is tried in parts", len(plan.slices), exc_info=error
            )
            return FinishedComputation(self._compute_in_parts(plan, lease, error))

    def _compute_in_parts(self, plan: StepPlan, lease: AdapterLease, error: Exception) -> StepOutputs:
        found: dict[SequenceKey, SliceOutput] = {}
        invalid: set[SequenceKey] = set()
        retries = 0
        untried = deque(_halves(plan.slices))
        while untried and retries < _MOST_RETRIES:
            part = untried.popleft()
            retries += 1
            try:
                outputs = self._compute(StepPlan(part), lease)
            except Exception as cause:  # noqa: BLE001 - as of a whole step: it ends what is in it, never the server
                error = cause
                untried.extend(_halves(part))
                continue
            found.update(zip((each.key for each in part), outputs.outputs, strict=True))
            invalid.update(outputs.invalid)
        if not found:
            raise error
        faults = tuple(part.key for part in plan.slices if part.key not in found)
        _log.error("%d sequences of a step of %d failed", len(faults), len(plan.slices), exc_info=error)
        return StepOutputs(
            outputs=tuple(found.get(part.key, SliceOutput(None)) for part in plan.slices),
            invalid=tuple(part.key for part in plan.slices if part.key in invalid),
            faults=faults,
        )

    def _compute(self, plan: StepPlan, lease: AdapterLease) -> StepOutputs:
        """Compute a part of the plan whose adapters `lease` holds."""
        weights = {ref.digest: lease.weights[ref.digest] for ref in plan.adapters}
        return self._executor.launch(plan, AdapterLease(weights, _keep)).outputs()


def _halves(slices: tuple[Slice, ...]) -> tuple[tuple[Slice, ...], ...]:
    """Halve the slices; a single one is at fault, and is not tried again."""
    middle = len(slices) // 2
    return (slices[:middle], slices[middle:]) if middle else ()


def _keep() -> None:
    """Release nothing: the whole plan's lease does."""
