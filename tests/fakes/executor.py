"""An executor without a model: each token follows from the adapter, the prompt and the token's index alone."""

import threading
from collections.abc import Callable

from engine.executor import StepOutputs
from lora.store import Lease
from scheduler.plan import Slice, SliceOutput, StepPlan

FIRST_TOKEN, ALPHABET = 68, 26  # `a` to `z` of the tests' byte-level tokenizer


def token_of(part: Slice) -> int:
    """The token that the slice draws."""
    return FIRST_TOKEN + (part.request.prompt_token_ids[0] + part.adapter.rank + part.output_index) % ALPHABET


class FakeExecutor:
    """Draws `token_of`; steps wait while `gate` is clear; `fault` may raise, and `breaks` marks sequences."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fault: Callable[[StepPlan], None] = lambda plan: None
        self.breaks: Callable[[Slice], bool] = lambda part: False
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan, lease: Lease) -> StepOutputs:
        """As StepExecutor.run; insists that the lease holds the plan's adapters."""
        assert set(lease.weights) == {ref.digest for ref in plan.adapters}
        self.plans.append(plan)
        self.entered.set()
        assert self.gate.wait(60), "the test left the gate closed"
        self.fault(plan)
        outputs = tuple(SliceOutput(token_of(part) if part.samples else None) for part in plan.slices)
        return StepOutputs(outputs, tuple(part.key for part in plan.slices if self.breaks(part)))
