"""Compute steps on several devices, replayed on all of them where they can be.

A device that waits for another in vain is released when the workers fail, and what it has computed then means
nothing. So a step's outputs count only if no worker has failed after they have come.
"""

from dataclasses import dataclass

from engine.runner.base import Computation, StepExecutor, StepGraphs, StepOutputs
from engine.runner.input_batch import InputBatch
from engine.tensor_parallel.parallel_model import ParallelModel
from lora.segments import AdapterLease, SegmentTable
from scheduler.plan import StepPlan


class ParallelGraphs:
    """StepGraphs of the first device, which have the others replay too."""

    def __init__(self, graphs: StepGraphs, model: ParallelModel) -> None:
        """Replay the first device's `graphs`, which call `model.lead`."""
        self._graphs, self._model = graphs, model

    def takes(self, inputs: InputBatch) -> bool:
        """See StepGraphs."""
        return self._graphs.takes(inputs)

    def run(self, inputs: InputBatch, segments: SegmentTable) -> None:
        """See StepGraphs. Raises WorkersFailed."""
        with self._model.joint_step():
            self._graphs.run(inputs, segments)


@dataclass(frozen=True, slots=True)
class ParallelComputation:
    """A launched plan of all devices."""

    computation: Computation
    model: ParallelModel

    @property
    def done(self) -> bool:
        """See Computation."""
        return self.computation.done

    def outputs(self) -> StepOutputs:
        """See Computation. Raises WorkersFailed."""
        with self.model.joint_step():
            outputs = self.computation.outputs()
        self.model.check()
        return outputs


class ParallelExecutor:
    """StepExecutor of all devices, around the first one's."""

    def __init__(self, executor: StepExecutor, model: ParallelModel) -> None:
        """Launch by `executor`, which computes with `model`."""
        self._executor, self._model = executor, model

    def launch(self, plan: StepPlan, lease: AdapterLease) -> ParallelComputation:
        """See StepExecutor."""
        return ParallelComputation(self._executor.launch(plan, lease), self._model)
