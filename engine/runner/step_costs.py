"""Learn what steps cost on this machine, and bound those that read prompts.

The step thread owns it; any thread may read.
"""

from collections.abc import Sequence

from scheduler.cluster.cost.learnt import LearntCost
from scheduler.cluster.cost.model import CostModel, Kernel, load_of
from scheduler.cluster.cost.pace import Pace
from scheduler.limits import MOST_ROWS
from scheduler.plan import StepPlan
from scheduler.step_budget import StepBudget

_LEARNT_FROM = 4  # one step in so many: to learn from each costs more than it tells


class StepCosts:
    """What routers are told of a node's steps, and how many rows the next may have.

    `models` are a profile's, first that of this engine's kernels. Where `step_s` is given a step is to last no
    longer, as far as prompts can wait.
    """

    def __init__(self, models: Sequence[CostModel], step_s: float | None, most_rows: int) -> None:
        self._learnt = LearntCost(models)
        self._budget = StepBudget(step_s, most_rows) if step_s else None
        self._steps = self._steps_told = 0

    @property
    def rows(self) -> int:
        """Return the most rows of prompts in the next step."""
        return MOST_ROWS if self._budget is None else self._budget.rows

    @property
    def step_rows(self) -> int | None:
        """Return the bound that routers are told; None without one."""
        return None if self._budget is None else self._budget.rows

    @property
    def kernel(self) -> Kernel:
        """Return the kind of kernel that the steps look like."""
        return self._learnt.kernel

    @property
    def pace(self) -> Pace:
        """Return the factors on what the profile says."""
        return self._learnt.pace.rounded()

    @property
    def slowdown(self) -> float:
        """Return how many times longer steps take than the profile says."""
        return self._learnt.slowdown

    def ran(self, plan: StepPlan, seconds: float) -> None:
        """Take in that a step took `seconds`."""
        self._steps += 1
        if self._budget is None and self._steps % _LEARNT_FROM:
            return
        load = load_of(plan)
        if self._budget is not None:
            self._budget.ran(sum(part.prefill_tokens for part in load.adapters), seconds)
        if self._steps % _LEARNT_FROM == 0:
            self._learnt.observe(load, seconds)

    def rest_if_idle(self) -> None:
        """Doubt what was learnt a little if no step has run since the last call; wanted about once a second."""
        if self._steps == self._steps_told:
            self._learnt.rest()
        self._steps_told = self._steps
