"""LeaseTable: what a node lends, by name, and the leases that pin it. It knows neither sockets nor clocks.

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
    drained: Future[None] = field(default_factory=Future)

    def is_drained(self) -> bool:
        return self.withdrawn and not self.leases


class LeaseTable:
    """Names, their regions and their open leases; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offers: dict[str, _Publication] = {}
        self._lent: dict[int, _Publication] = {}
        self._endings = dict.fromkeys(Ending, 0)

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """Lend `regions` as `name`; RegionRefused if the name is taken or nothing is given."""
        if not regions:
            raise RegionRefused(f"{name!r} has no regions: publish at least one")
        with self._lock:
            if name in self._offers:
                raise RegionRefused(f"{name!r} is published already: withdraw it first")
            self._offers[name] = _Publication(tuple(regions))

    def withdraw(self, name: str) -> Future[None]:
        """Lend `name` no more; done when its last lease has ended. NotOffered if it is not published."""
        with self._lock:
            offer = self._offers.pop(name, None)
            if offer is None:
                raise NotOffered(f"{name!r} is not published here: nothing to withdraw")
            offer.withdrawn = True
            drained = offer.is_drained()
        if drained:
            offer.drained.set_result(None)
        return offer.drained

    def lend(self, name: str) -> tuple[int, tuple[Region, ...]]:
        """Open a lease: its ticket, which nobody can guess, and the regions it pins. NotOffered if there are none."""
        with self._lock:
            offer = self._offers.get(name)
            if offer is None:
                raise NotOffered(f"{name!r} is not published here: refresh the holdings of this node")
            ticket = secrets.randbits(62)
            offer.leases += 1
            self._lent[ticket] = offer
            return ticket, offer.regions

    def end(self, ticket: int, ending: Ending) -> None:
        """Close an open lease."""
        with self._lock:
            offer = self._lent.pop(ticket)
            offer.leases -= 1
            self._endings[ending] += 1
            drained = offer.is_drained()
        if drained:  # outside the lock: whoever waits may call back at once
            offer.drained.set_result(None)

    def lends(self, region: Region) -> bool:
        """True if a byte of `region` is published, or still pinned by a lease."""
        with self._lock:
            offers = [*self._offers.values(), *self._lent.values()]
        return any(region.overlaps(mine) for offer in offers for mine in offer.regions)

    def names(self) -> int:
        """Published names."""
        with self._lock:
            return len(self._offers)

    def leases(self) -> int:
        """Open leases."""
        with self._lock:
            return len(self._lent)

    def endings(self) -> Mapping[str, int]:
        """How many leases ended in which way."""
        with self._lock:
            return {ending.value: count for ending, count in self._endings.items()}
