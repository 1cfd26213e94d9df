"""Directory: who may have what this node lacks. It says whom to ask, never what is true: a holder may have let a
content go meanwhile, and where its bytes lie is told by the holder itself, with the lease that pins them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transport.base import Address


class Directory(Protocol):
    """Whom to ask; any thread may."""

    def holders(self, digest: str) -> Sequence[Address]:
        """Peers that may have this content, the best first."""
        ...

    def peers(self) -> Sequence[Address]:
        """Peers that may know a name."""
        ...


@dataclass(frozen=True, slots=True)
class StaticDirectory:
    """The same peers, in the same order, for everything."""

    addresses: tuple[Address, ...]

    def holders(self, digest: str) -> Sequence[Address]:
        """See `Directory`."""
        return self.addresses

    def peers(self) -> Sequence[Address]:
        """See `Directory`."""
        return self.addresses
