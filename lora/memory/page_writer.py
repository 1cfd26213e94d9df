"""PageWriter: how a content lies in the arena. DirectWriter on one device; a group of devices keeps a share on each.

Whoever brings a content in fills its landing and has it stowed; who may stay where is decided elsewhere.
"""

from typing import Protocol

import torch
from torch import Tensor

from lora.format.packed import PackedLayout, view
from lora.segments import AdapterWeights


class PageWriter(Protocol):
    """How the contents of one arena lie. `place` is a content's pages; all methods may be called from any thread."""

    def nbytes(self, layout: PackedLayout) -> int:
        """Bytes of the arena that a content takes."""
        ...

    def landing(self, place: Tensor, layout: PackedLayout) -> Tensor:
        """Where the whole flat form is to be written, [at least layout.nbytes] uint8."""
        ...

    def stow(self, place: Tensor, landed: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """What steps run, once the landing is filled. May wait; raises what moving the bytes raises."""
        ...


class DirectWriter:
    """The arena's pages hold the flat form itself, so that what lands there is in its place."""

    def nbytes(self, layout: PackedLayout) -> int:
        """See PageWriter."""
        return layout.nbytes

    def landing(self, place: Tensor, layout: PackedLayout) -> Tensor:
        """See PageWriter."""
        return place

    def stow(self, place: Tensor, landed: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """See PageWriter."""
        return view(place, layout, digest)


class DeviceCopier:
    """Copies into memory of `device` beside its steps: neither waits for the other. From any thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 of host memory, from which a GPU copies at full speed."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def bring(self, place: Tensor, rows: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """Copy the flat form in `rows` to `place`, each [at least layout.nbytes] uint8, and wait for it. The place is
        nobody's else, and no step still reads it: a lease outlives its step."""
        if self._stream is None:
            return self._brought(place, rows, layout, digest)
        with torch.cuda.stream(self._stream):
            weights = self._brought(place, rows, layout, digest)
        self._stream.synchronize()
        return weights

    def _brought(self, place: Tensor, rows: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        place[: layout.nbytes].copy_(rows[: layout.nbytes], non_blocking=self._stream is not None)
        return view(
            place, layout, digest
        )  # which sends the scales: on the steps' stream they would wait for the steps


class PinnedWriter:
    """PageWriter for an arena on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._inlet = DeviceCopier(device)

    def nbytes(self, layout: PackedLayout) -> int:
        """See PageWriter."""
        return layout.nbytes

    def landing(self, place: Tensor, layout: PackedLayout) -> Tensor:
        """See PageWriter."""
        return self._inlet.buffer(layout.nbytes)

    def stow(self, place: Tensor, landed: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """See PageWriter."""
        return self._inlet.bring(place, landed, layout, digest)
