"""GroupExecutor: steps of several devices that the host does not wait for, replayed on all of them where they can be.

A device that waits for another in vain is let go when the group fails, and what it has computed then means nothing: so
a step's outputs count only if the group stands after they have come.
"""

from dataclasses import dataclass

from engine.runner.async_executor import Graphs
from engine.runner.base import Computation, StepExecutor, StepOutputs
from engine.runner.input_batch import InputBatch
from engine.tensor_parallel.model import GroupModel
from lora.segments import AdapterLease, SegmentTable
from scheduler.plan import StepPlan


class GroupGraphs:
    """Graphs of the first device, which tell the others what to replay."""

    def __init__(self, graphs: Graphs, group: GroupModel) -> None:
        self._graphs, self._group = graphs, group

    def takes(self, layout: InputBatch) -> bool:
        """See Graphs."""
        return self._graphs.takes(layout)

    def run(self, layout: InputBatch, table: SegmentTable) -> None:
        """See Graphs. Raises GroupFailed."""
        with self._group.together():
            self._graphs.run(layout, table)


@dataclass(frozen=True, slots=True)
class GroupComputation:
    """A launched plan of all devices."""

    computation: Computation
    group: GroupModel

    @property
    def done(self) -> bool:
        """See Computation."""
        return self.computation.done

    def outputs(self) -> StepOutputs:
        """See Computation. Raises GroupFailed."""
        with self.group.together():
            outputs = self.computation.outputs()
        self.group.check()
        return outputs


class GroupExecutor:
    """StepExecutor around the first device's."""

    def __init__(self, executor: StepExecutor, group: GroupModel) -> None:
        self._executor, self._group = executor, group

    def launch(self, plan: StepPlan, lease: AdapterLease) -> GroupComputation:
        """See StepExecutor."""
        return GroupComputation(self._executor.launch(plan, lease), self._group)
