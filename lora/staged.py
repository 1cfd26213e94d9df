"""Staged: contents of an arena in a GPU's memory. They land in pinned host memory and are copied on a stream of their
own, beside the steps: neither waits for the other."""

import torch
from torch import Tensor

from lora.flat import FlatLayout, view
from lora.segments import AdapterWeights


class Staged:
    """Stowage for an arena on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def nbytes(self, layout: FlatLayout) -> int:
        """See Stowage."""
        return layout.nbytes

    def landing(self, place: Tensor, layout: FlatLayout) -> Tensor:
        """See Stowage."""
        return torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=True)

    def stow(self, place: Tensor, landed: Tensor, layout: FlatLayout, digest: str) -> AdapterWeights:
        """See Stowage. The place is nobody's else, and no step still reads it: a lease outlives its step."""
        with torch.cuda.stream(self._stream):
            place[: layout.nbytes].copy_(landed[: layout.nbytes], non_blocking=True)
            # `view` sends the scales, which on the steps' stream would wait for the steps
            weights = view(place, layout, digest)
        self._stream.synchronize()
        return weights
