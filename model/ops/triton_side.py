"""A second stream, on which the adapters' first half runs beside the base projection of the same input."""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """Runs work that depends on a tensor alone, without waiting for what the main stream was given since.

    Both streams are one again when `run` returns, so whatever main is given next may read the work's result. On a
    CPU the work runs at once. Under capture the fork becomes a branch of the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._marked: Tensor | None = None
        self._complete = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self, x: Tensor) -> None:
        """Say that `x` is complete once the main stream has done what it has been given so far."""
        if self._complete is not None:
            self._marked = x
            self._complete.record()

    def run(self, x: Tensor, work: Callable[[], None]) -> None:
        """Run `work`, which reads `x`: from its mark on, or, without one, after all that main has been given."""
        if self._stream is None or self._complete is None:
            work()
            return
        if x is not self._marked:
            self._complete.record()
        self._stream.wait_event(self._complete)
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._marked = None
