"""What a device has computed counts only if all devices stood to the end of it."""

from typing import Any

import pytest

from engine.errors import GroupFailed
from engine.runner.base import StepOutputs
from engine.tensor_parallel.executor import GroupComputation, GroupGraphs
from scheduler.plan import SliceOutput
from tests.engine.group.test_model import build

TOLD = StepOutputs((SliceOutput(7),), ())


class _Computation:
    """Computed while `meanwhile` happens."""

    done = True

    def __init__(self, meanwhile: Any) -> None:
        self._meanwhile = meanwhile

    def outputs(self) -> StepOutputs:
        self._meanwhile()
        return TOLD


class _Graphs:
    """Graphs whose replay does what it is told."""

    def __init__(self, replay: Any) -> None:
        self._replay = replay

    def takes(self, layout: object) -> bool:
        return True

    def run(self, layout: object, table: object) -> None:
        self._replay()


def test_outputs_of_a_group_that_stands() -> None:
    model, _, _ = build(None)
    assert GroupComputation(_Computation(lambda: None), model).outputs() == TOLD


def test_tokens_drawn_while_another_device_was_lost_are_not_told() -> None:
    """Whoever waits for it is let go, and reads memory that nobody has filled."""
    model, workers, _ = build(None)
    computation = GroupComputation(_Computation(lambda: workers.fail(1, "it was ended by signal 9")), model)
    with pytest.raises(GroupFailed, match="signal 9"):
        computation.outputs()


def test_a_device_that_cannot_be_read_ends_the_group() -> None:
    model, workers, _ = build(None)

    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(GroupFailed, match="illegal memory access"):
        GroupComputation(_Computation(broken), model).outputs()
    assert workers.failure is not None


def test_a_replay_that_fails_ends_the_group() -> None:
    model, workers, _ = build(None)

    def broken() -> None:
        raise RuntimeError("out of memory")

    replayed: Any = None
    with pytest.raises(GroupFailed, match="out of memory"):
        GroupGraphs(_Graphs(broken), model).run(replayed, replayed)
    with pytest.raises(GroupFailed, match="out of memory"):
        model.forward(replayed, replayed)
    assert workers.steps == []
