"""A second stream, on which the adapters' first half runs beside the base projection of the same input."""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """Forks from the main stream and joins it again; on a CPU one thing runs after the other.

    Under capture the fork becomes a branch of the graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def beside(self, main: Callable[[], Tensor], aside: Callable[[], None]) -> Tensor:
        """What `main` returns. `aside` depends on nothing that `main` does; both are done for what comes next.

        Main's launches go first: a persistent grid would leave them no room until it is through.
        """
        if self._stream is None:
            aside()
            return main()
        stream = torch.cuda.current_stream()
        forked = stream.record_event()
        result = main()
        self._stream.wait_event(forked)
        with torch.cuda.stream(self._stream):
            aside()
        stream.wait_stream(self._stream)
        return result
