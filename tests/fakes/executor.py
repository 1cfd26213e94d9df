"""An executor without a model: each token follows from the adapter, the prompt and the token's index alone."""

import threading
from collections.abc import Callable

from engine.runner.base import StepOutputs
from engine.runner.executor import FinishedComputation
from lora.segments import AdapterLease
from scheduler.plan import Slice, SliceOutput, StepPlan

FIRST_TOKEN, ALPHABET = 68, 26  # `a` to `z` of the tests' byte-level tokenizer


def token_of(part: Slice) -> int:
    """The token that the slice draws."""
    return FIRST_TOKEN + (part.request.prompt_token_ids[0] + part.adapter.rank + part.output_index) % ALPHABET


class LateComputation:
    """A plan whose outputs are there only once they are waited for."""

    done = False

    def __init__(self, result: StepOutputs, on_read: Callable[[], None]) -> None:
        self._result, self._on_read = result, on_read

    def outputs(self) -> StepOutputs:
        """As Computation.outputs."""
        self._on_read()
        return self._result


class FakeExecutor:
    """Draws `token_of`; steps wait while `gate` is clear; `fault` and `fault_on_read` may raise, and `invalid`
    marks sequences.

    A lagging one is done only when it is asked for its outputs, as a device may be, and insists that no more than two
    steps are ever unread, and that they are read in their order.
    """

    def __init__(self, *, lags: bool = False) -> None:
        self._lags = lags
        self._unread: list[StepPlan] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fault: Callable[[StepPlan], None] = lambda plan: None
        self.fault_on_read: Callable[[StepPlan], None] = lambda plan: None
        self.invalid: Callable[[Slice], bool] = lambda part: False
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan, lease: AdapterLease) -> FinishedComputation | LateComputation:
        """As StepExecutor.launch; insists that the lease holds the plan's adapters."""
        assert set(lease.weights) == {ref.digest for ref in plan.adapters}
        self.plans.append(plan)
        self.entered.set()
        assert self.gate.wait(60), "the test left the gate closed"
        self.fault(plan)
        outputs = tuple(SliceOutput(token_of(part) if part.samples else None) for part in plan.slices)
        result = StepOutputs(outputs, tuple(part.key for part in plan.slices if self.invalid(part)))
        if not self._lags:
            return FinishedComputation(result)
        self._unread.append(plan)
        assert len(self._unread) <= 2
        return LateComputation(result, lambda: self._read(plan, lease))

    def _read(self, plan: StepPlan, lease: AdapterLease) -> None:
        assert self._unread.pop(0) is plan, "steps are read in the order in which they were launched"
        assert set(lease.weights) == {ref.digest for ref in plan.adapters}
        self.fault_on_read(plan)
