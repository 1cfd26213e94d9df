"""Keep account of what a node publishes, by name, and of the leases that pin it. No sockets here, and no clocks.

A name's pages may change only when it is withdrawn *and* its last lease has ended; both orders are fine. Whoever
serves a lease must end it exactly once, by whichever comes first: a notification, its deadline, the puller's death.
"""

import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from transport.base import Region
from transport.errors import NotOffered, RegionRefused


class Ending(StrEnum):
    """Why a lease ended."""

    READ = "read"
    RELEASED = "released"
    EXPIRED = "expired"
    GONE = "gone"


@dataclass(slots=True)
class _Publication:
    """One published name; `drained` is done once it is withdrawn and nobody reads it."""

    regions: tuple[Region, ...]
    leases: int = 0
    withdrawn: bool = False
    drained: Future[None] = field(default_factory=Future[None])

    def is_drained(self) -> bool:
        return self.withdrawn and not self.leases


class LeaseTable:
    """Names, their regions and their open leases; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._published: dict[str, _Publication] = {}
        self._leased: dict[int, _Publication] = {}
        self._endings = dict.fromkeys(Ending, 0)

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """Let `regions` be leased as `name`. Raises RegionRefused if the name is taken or nothing is given."""
        if not regions:
            raise RegionRefused(f"{name!r} has no regions: publish at least one")
        with self._lock:
            if name in self._published:
                raise RegionRefused(f"{name!r} is published already: withdraw it first")
            self._published[name] = _Publication(tuple(regions))

    def withdraw(self, name: str) -> Future[None]:
        """Let nobody lease `name` any more. Raises NotOffered if it is not published.

        The future is done when its last lease has ended.
        """
        with self._lock:
            publication = self._published.pop(name, None)
            if publication is None:
                raise NotOffered(f"{name!r} is not published here: nothing to withdraw")
            publication.withdrawn = True
            drained = publication.is_drained()
        if drained:
            publication.drained.set_result(None)
        return publication.drained

    def open(self, name: str) -> tuple[int, tuple[Region, ...]]:
        """Open a lease: its ticket, which nobody can guess, and the regions it pins. Raises NotOffered."""
        with self._lock:
            publication = self._published.get(name)
            if publication is None:
                raise NotOffered(f"{name!r} is not published here: refresh what is known of this node")
            ticket = secrets.randbits(62)
            publication.leases += 1
            self._leased[ticket] = publication
            return ticket, publication.regions

    def end(self, ticket: int, ending: Ending) -> None:
        """Close an open lease."""
        with self._lock:
            publication = self._leased.pop(ticket)
            publication.leases -= 1
            self._endings[ending] += 1
            drained = publication.is_drained()
        if drained:  # outside the lock: whoever waits may call back at once
            publication.drained.set_result(None)

    def holds(self, region: Region) -> bool:
        """Tell if a byte of `region` is published, or still pinned by a lease."""
        with self._lock:
            publications = [*self._published.values(), *self._leased.values()]
        return any(region.overlaps(mine) for publication in publications for mine in publication.regions)

    def names(self) -> int:
        """Count the published names."""
        with self._lock:
            return len(self._published)

    def leases(self) -> int:
        """Count the open leases."""
        with self._lock:
            return len(self._leased)

    def endings(self) -> Mapping[str, int]:
        """Count how many leases ended in which way."""
        with self._lock:
            return {ending.value: count for ending, count in self._endings.items()}
