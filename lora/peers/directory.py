"""Say whom to ask for what this node lacks, never what is true.

A holder may have let a content go meanwhile. Where its bytes lie is told by the holder itself, with the lease that
pins them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transport.base import Address


class Directory(Protocol):
    """Whom to ask; any thread may."""

    def holders(self, digest: str) -> Sequence[Address]:
        """List the peers that may have this content, each once, the best first."""
        ...

    def peers(self) -> Sequence[Address]:
        """List the peers that may know a name, each once."""
        ...


@dataclass(frozen=True, slots=True)
class StaticDirectory:
    """The same peers, in the same order, for everything."""

    addresses: tuple[Address, ...]

    def holders(self, digest: str) -> Sequence[Address]:
        """List them all."""
        return self.addresses

    def peers(self) -> Sequence[Address]:
        """List them all."""
        return self.addresses


@dataclass(frozen=True, slots=True)
class KnownHolders:
    """What a coordinator knows: this node's peers, and who holds which digest, the best first."""

    peers: tuple[Address, ...]
    holders: Mapping[str, tuple[Address, ...]] = field(default_factory=dict[str, tuple[Address, ...]])


class ReportedDirectory:
    """The last KnownHolders that were reported, for a node of a cluster whose coordinator reports them.

    Known holders come first; the other peers may have what was not reported yet. It needs no lock: a report is a frozen
    value, and replaces the last one as a whole.
    """

    def __init__(self, known: KnownHolders) -> None:
        self._known = known

    def update(self, known: KnownHolders) -> None:
        """Replace all that is known."""
        self._known = known

    def holders(self, digest: str) -> Sequence[Address]:
        """List the known holders, then the other peers."""
        known = self._known
        return tuple(dict.fromkeys((*known.holders.get(digest, ()), *known.peers)))

    def peers(self) -> Sequence[Address]:
        """List the peers of the last report."""
        return self._known.peers
