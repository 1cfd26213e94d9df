"""Devices of one model that are threads of this process."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_PATIENCE_S = 60


class Meeting:
    """Where `size` threads exchange tensors; each takes its own `member`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=_PATIENCE_S)

    def member(self, rank: int) -> "ThreadCollective":
        """The collective of thread `rank`."""
        return ThreadCollective(self, rank)

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run one job a member, at the same time; their results."""
        with ThreadPoolExecutor(self.size) as threads:
            return [each.result() for each in [threads.submit(job) for job in jobs]]


class ThreadCollective:
    """A Collective among threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank
        self.calls: list[str] = []

    def sum(self, x: Tensor) -> Tensor:
        """See Collective."""
        self.calls.append("sum")
        return torch.stack(self._exchange(x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        """See Collective."""
        self.calls.append("gather")
        everyones = self._exchange(x)
        return torch.cat(everyones, dim=1) if self._rank == 0 else x

    def _exchange(self, x: Tensor) -> list[Tensor]:
        meeting = self._meeting
        meeting.slots[self._rank] = x.clone()
        meeting.barrier.wait()
        found = [slot for slot in meeting.slots if slot is not None]
        meeting.barrier.wait()
        return found
