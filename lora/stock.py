"""Stock: what a node has, as its lending sees it."""

from typing import Protocol

from torch import Tensor

from lora.flat import FlatLayout


class Stock(Protocol):
    """Any thread may ask."""

    def declares(self, name: str) -> bool:
        """Whether `name` has a folder here that was not read yet. Never waits."""
        ...

    def read(self, name: str) -> None:
        """Read the folder of a declared name, which tells lending what the name means. Waits; AdapterRefused."""
        ...

    def layout(self, digest: str) -> FlatLayout | None:
        """The layout of a content that this node knows. Never waits."""
        ...

    def fetch_here(self, digest: str, destination: Tensor) -> bool:
        """Fill `destination` from what is on this node: memory, disk or folder. Waits; AdapterLost; False: not here."""
        ...
