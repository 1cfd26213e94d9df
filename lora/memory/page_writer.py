"""Write contents into the arena: in place, or by a staging buffer in pinned host memory.

Whoever loads a content fills its staging buffer, then has it written. Who may lie where is decided elsewhere.
"""

from typing import Protocol

import torch
from torch import Tensor

from lora.format.packed import PackedLayout, view
from lora.segments import AdapterWeights


class PageWriter(Protocol):
    """How the contents of one arena are written. `pages` are a content's; any thread may call every method."""

    def nbytes(self, layout: PackedLayout) -> int:
        """Return the bytes of the arena that a content takes."""
        ...

    def staging_buffer(self, pages: Tensor, layout: PackedLayout) -> Tensor:
        """Return where the whole packed form is to be put first, [at least layout.nbytes] uint8."""
        ...

    def write(self, pages: Tensor, staged: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """Return what steps run, once the staging buffer is filled. May wait; raises what moving the bytes raises."""
        ...


class DirectWriter:
    """Has a content put into its pages directly: they are its staging buffer."""

    def nbytes(self, layout: PackedLayout) -> int:
        """Return the packed form's bytes."""
        return layout.nbytes

    def staging_buffer(self, pages: Tensor, layout: PackedLayout) -> Tensor:
        """Return the pages themselves."""
        return pages

    def write(self, pages: Tensor, staged: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """View what lies in the pages."""
        return view(pages, layout, digest)


class PinnedWriter:
    """Copies contents from pinned host memory to `device`, beside its steps: neither waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def nbytes(self, layout: PackedLayout) -> int:
        """Return the packed form's bytes."""
        return layout.nbytes

    def staging_buffer(self, pages: Tensor, layout: PackedLayout) -> Tensor:
        """Allocate host memory, from which a GPU copies at full speed."""
        return self.pinned_buffer(layout.nbytes)

    def pinned_buffer(self, nbytes: int) -> Tensor:
        """Allocate [nbytes] uint8 of host memory, pinned where the device is a GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def write(self, pages: Tensor, staged: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """Copy the packed form to its pages, and wait for it.

        The pages are nobody else's, and no step still reads them: a lease outlives its step.
        """
        if self._stream is None:
            return self._copy(pages, staged, layout, digest)
        with torch.cuda.stream(self._stream):
            weights = self._copy(pages, staged, layout, digest)
        self._stream.synchronize()
        return weights

    def _copy(self, pages: Tensor, staged: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        pages[: layout.nbytes].copy_(staged[: layout.nbytes], non_blocking=self._stream is not None)
        # The view sends the scales: on the steps' stream they would wait for the steps.
        return view(pages, layout, digest)
