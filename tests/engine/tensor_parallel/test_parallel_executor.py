"""What a device has computed counts only if no other has failed by the end of it."""

from typing import Any

import pytest

from engine.errors import WorkersFailed
from engine.runner.base import StepOutputs
from engine.tensor_parallel.parallel_executor import ParallelComputation, ParallelGraphs
from scheduler.plan import SliceOutput
from tests.engine.tensor_parallel.test_parallel_model import build

OUTPUTS = StepOutputs((SliceOutput(7),), ())


class _Computation:
    """Computed while `meanwhile` happens."""

    done = True

    def __init__(self, meanwhile: Any) -> None:
        self._meanwhile = meanwhile

    def outputs(self) -> StepOutputs:
        self._meanwhile()
        return OUTPUTS


class _Graphs:
    """Graphs whose replay calls a function."""

    def __init__(self, replay: Any) -> None:
        self._replay = replay

    def takes(self, inputs: object) -> bool:
        return True

    def run(self, inputs: object, segments: object) -> None:
        self._replay()


def test_outputs_of_workers_that_have_not_failed() -> None:
    model, _, _ = build(None)
    assert ParallelComputation(_Computation(lambda: None), model).outputs() == OUTPUTS


def test_tokens_drawn_while_another_device_was_lost_are_not_returned() -> None:
    """A device that waits for it is released, and reads memory that nothing has filled."""
    model, workers, _ = build(None)
    computation = ParallelComputation(
        _Computation(lambda: workers.fail(1, "it was ended by signal 9")), model
    )
    with pytest.raises(WorkersFailed, match="signal 9"):
        computation.outputs()


def test_a_device_that_cannot_be_read_ends_the_workers() -> None:
    model, workers, _ = build(None)

    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(WorkersFailed, match="illegal memory access"):
        ParallelComputation(_Computation(broken), model).outputs()
    assert workers.failure is not None


def test_a_replay_that_fails_ends_the_workers() -> None:
    model, workers, _ = build(None)

    def broken() -> None:
        raise RuntimeError("out of memory")

    replayed: Any = None
    with pytest.raises(WorkersFailed, match="out of memory"):
        ParallelGraphs(_Graphs(broken), model).run(replayed, replayed)
    with pytest.raises(WorkersFailed, match="out of memory"):
        model.forward(replayed, replayed)
    assert workers.steps == []
