"""Whatever goes wrong within a step of several processes ends all of them, for good."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import WorkersFailed
from engine.tensor_parallel.messages import Step
from engine.tensor_parallel.parallel_model import ParallelModel
from tests.model.driver import Piece, lay_out

BATCH = lay_out([Piece((5, 6), 0, (0,))], 4)


class _Workers:
    """Workers that do not exist."""

    def __init__(self) -> None:
        self.failure: WorkersFailed | None = None
        self.steps: list[Step] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def cause(self, error: Exception) -> WorkersFailed:
        return self.fail(0, str(error))

    def fail(self, rank: int, reason: str) -> WorkersFailed:
        self.failure = self.failure or WorkersFailed(rank, 2, reason)
        return self.failure


class _Part:
    """A model that raises a given error."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def forward(self, batch: object, cache: object) -> Tensor:
        if self._error is not None:
            raise self._error
        return torch.ones(2, 3)


class _Processes:
    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def broadcast(self, x: Tensor) -> Tensor:
        self.sent.append(x)
        return x


def build(error: BaseException | None) -> tuple[Any, _Workers, _Processes]:
    part: Any = _Part(error)
    workers: Any = _Workers()
    processes: Any = _Processes()
    return ParallelModel(part, workers, processes), workers, processes


def test_a_step_is_described_then_sent_then_computed() -> None:
    model, workers, processes = build(None)
    assert model.forward(BATCH, None).shape == (2, 3)
    assert [step.query_lens for step in workers.steps] == [(2,)]
    assert len(processes.sent) == 1
    model.lead(BATCH)
    assert [step.replayed for step in workers.steps] == [False, True]


def test_an_error_here_ends_the_workers() -> None:
    model, workers, _ = build(RuntimeError("out of memory"))
    with pytest.raises(WorkersFailed, match="out of memory"):
        model.forward(BATCH, None)
    with pytest.raises(WorkersFailed, match="out of memory"):
        model.forward(BATCH, None)
    assert len(workers.steps) == 1


def test_an_interrupt_within_a_step_is_too() -> None:
    model, workers, _ = build(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model.forward(BATCH, None)
    with pytest.raises(WorkersFailed, match="interrupted"):
        model.forward(BATCH, None)
    assert len(workers.steps) == 1
