"""Staged: contents of an arena in a GPU's memory. They land in pinned host memory and are copied beside the steps."""

import torch
from torch import Tensor

from lora.flat import FlatLayout
from lora.inlet import Inlet
from lora.segments import AdapterWeights


class Staged:
    """Stowage for an arena on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._inlet = Inlet(device)

    def nbytes(self, layout: FlatLayout) -> int:
        """See Stowage."""
        return layout.nbytes

    def landing(self, place: Tensor, layout: FlatLayout) -> Tensor:
        """See Stowage."""
        return self._inlet.buffer(layout.nbytes)

    def stow(self, place: Tensor, landed: Tensor, layout: FlatLayout, digest: str) -> AdapterWeights:
        """See Stowage."""
        return self._inlet.bring(place, landed, layout, digest)
