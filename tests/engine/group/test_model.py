"""Whatever goes wrong within a step of several devices ends them as a group, once and for all."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import GroupFailed
from engine.tensor_parallel.messages import Step
from engine.tensor_parallel.model import GroupModel
from tests.model.driver import Piece, lay_out

BATCH = lay_out([Piece((5, 6), 0, (0,))], 4)


class _Workers:
    """Workers that do not exist."""

    def __init__(self) -> None:
        self.failure: GroupFailed | None = None
        self.steps: list[Step] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def cause(self, error: Exception) -> GroupFailed:
        return self.fail(0, str(error))

    def fail(self, rank: int, reason: str) -> GroupFailed:
        self.failure = self.failure or GroupFailed(rank, 2, reason)
        return self.failure


class _Part:
    """A model that raises what it is told."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def forward(self, batch: object, cache: object) -> Tensor:
        if self._error is not None:
            raise self._error
        return torch.ones(2, 3)


class _Devices:
    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def broadcast(self, x: Tensor) -> Tensor:
        self.sent.append(x)
        return x


def build(error: BaseException | None) -> tuple[Any, _Workers, _Devices]:
    part: Any = _Part(error)
    workers: Any = _Workers()
    devices: Any = _Devices()
    return GroupModel(part, workers, devices), workers, devices


def test_a_step_is_told_then_sent_then_computed() -> None:
    model, workers, devices = build(None)
    assert model.forward(BATCH, None).shape == (2, 3)
    assert [step.query_lens for step in workers.steps] == [(2,)]
    assert len(devices.sent) == 1
    model.lead(BATCH)
    assert [step.replayed for step in workers.steps] == [False, True]


def test_an_error_here_is_the_groups_end() -> None:
    model, workers, _ = build(RuntimeError("out of memory"))
    with pytest.raises(GroupFailed, match="out of memory"):
        model.forward(BATCH, None)
    with pytest.raises(GroupFailed, match="out of memory"):
        model.forward(BATCH, None)
    assert len(workers.steps) == 1


def test_an_interrupt_within_a_step_is_too() -> None:
    model, workers, _ = build(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model.forward(BATCH, None)
    with pytest.raises(GroupFailed, match="interrupted"):
        model.forward(BATCH, None)
    assert len(workers.steps) == 1
