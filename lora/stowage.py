"""Stowage: how a content lies in the arena. Whole on one device; a group of devices keeps a share on each.

Whoever brings a content in fills its landing and has it stowed; who may stay where is decided elsewhere.
"""

from typing import Protocol

from torch import Tensor

from lora.flat import FlatLayout, view
from lora.segments import AdapterWeights


class Stowage(Protocol):
    """How the contents of one arena lie. `place` is a content's pages; all methods may be called from any thread."""

    def nbytes(self, layout: FlatLayout) -> int:
        """Bytes of the arena that a content takes."""
        ...

    def landing(self, place: Tensor, layout: FlatLayout) -> Tensor:
        """Where the whole flat form is to be written, [at least layout.nbytes] uint8."""
        ...

    def stow(self, place: Tensor, landed: Tensor, layout: FlatLayout, digest: str) -> AdapterWeights:
        """What steps run, once the landing is filled. May wait; raises what moving the bytes raises."""
        ...


class Whole:
    """The arena's pages hold the flat form itself, so that what lands there is in its place."""

    def nbytes(self, layout: FlatLayout) -> int:
        """See Stowage."""
        return layout.nbytes

    def landing(self, place: Tensor, layout: FlatLayout) -> Tensor:
        """See Stowage."""
        return place

    def stow(self, place: Tensor, landed: Tensor, layout: FlatLayout, digest: str) -> AdapterWeights:
        """See Stowage."""
        return view(place, layout, digest)
