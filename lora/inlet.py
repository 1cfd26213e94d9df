"""Inlet: the way of an adapter's bytes from host memory into a device's, on a GPU by a stream of its own."""

import torch
from torch import Tensor

from lora.flat import FlatLayout, view
from lora.segments import AdapterWeights


class Inlet:
    """Copies into memory of `device` beside its steps: neither waits for the other. From any thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 of host memory, from which a GPU copies at full speed."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def bring(self, place: Tensor, rows: Tensor, layout: FlatLayout, digest: str) -> AdapterWeights:
        """Copy the flat form in `rows` to `place`, each [at least layout.nbytes] uint8, and wait for it. The place is
        nobody's else, and no step still reads it: a lease outlives its step."""
        if self._stream is None:
            return self._brought(place, rows, layout, digest)
        with torch.cuda.stream(self._stream):
            weights = self._brought(place, rows, layout, digest)
        self._stream.synchronize()
        return weights

    def _brought(self, place: Tensor, rows: Tensor, layout: FlatLayout, digest: str) -> AdapterWeights:
        place[: layout.nbytes].copy_(rows[: layout.nbytes], non_blocking=self._stream is not None)
        return view(
            place, layout, digest
        )  # which sends the scales: on the steps' stream they would wait for the steps
