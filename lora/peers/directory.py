"""Directory: who may have what this node lacks. It says whom to ask, never what is true: a holder may have let a
content go meanwhile, and where its bytes lie is told by the holder itself, with the lease that pins them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transport.base import Address


class Directory(Protocol):
    """Whom to ask; any thread may."""

    def holders(self, digest: str) -> Sequence[Address]:
        """Peers that may have this content, each once, the best first."""
        ...

    def peers(self) -> Sequence[Address]:
        """Peers that may know a name, each once."""
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


@dataclass(frozen=True, slots=True)
class KnownHolders:
    """What somebody who watches all nodes knows: the others, and who holds which digest, the best first."""

    peers: tuple[Address, ...]
    holders: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)


class ReportedDirectory:
    """The last KnownHolders. Known holders come first; the other peers may have what was not reported yet."""

    def __init__(self, whereabouts: KnownHolders) -> None:
        self._whereabouts = whereabouts

    def feed(self, whereabouts: KnownHolders) -> None:
        """Replace all that is known."""
        self._whereabouts = whereabouts

    def holders(self, digest: str) -> Sequence[Address]:
        """See `Directory`."""
        known = self._whereabouts
        return tuple(dict.fromkeys((*known.holders.get(digest, ()), *known.peers)))

    def peers(self) -> Sequence[Address]:
        """See `Directory`."""
        return self._whereabouts.peers
