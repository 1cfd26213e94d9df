"""Keep account of the destinations into which bytes may still come. They outlive the pull that claimed them.

A read that was given up cannot always be stopped: its remaining bytes land whenever the network delivers them. So
memory belongs to its destination until whoever moves the bytes says that the last one has come or never will.
"""

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from transport.base import Lease, Region
from transport.errors import RegionBusy, RegionRefused


@dataclass(slots=True, eq=False)
class Destination:
    """Regions that one pull writes to. Whoever moves the bytes must `end` it exactly once."""

    regions: tuple[Region, ...]
    table: "Destinations" = field(repr=False)
    quarantined: bool = False
    settled: Future[None] = field(default_factory=Future[None])

    @property
    def nbytes(self) -> int:
        """Count the bytes that it takes."""
        return sum(region.nbytes for region in self.regions)

    def check(self, lease: Lease) -> None:
        """Raise RegionRefused unless the lease's bytes fill it."""
        if lease.nbytes != self.nbytes:
            raise RegionRefused(
                f"{lease.name!r} has {lease.nbytes} bytes, its destination {self.nbytes}: make them equal"
            )

    def quarantine(self) -> None:
        """Mark that the pull has been given up, but bytes may still come."""
        self.quarantined = True

    @contextmanager
    def ended_on_error(self) -> Generator[None]:
        """End it if the block fails: no byte is on its way yet."""
        try:
            yield
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Mark that no byte can land there any more."""
        self.table.remove(self)
        self.settled.set_result(None)

    def overlaps(self, region: Region) -> bool:
        """Tell if bytes may land in `region`."""
        return any(region.overlaps(mine) for mine in self.regions)


class Destinations:
    """All destinations in use; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Destination] = []

    def claim(self, regions: Sequence[Region]) -> Destination:
        """Claim `regions`. Raises RegionBusy if one is claimed already or two of them overlap."""
        destination = Destination(tuple(regions), self)
        with self._lock:
            for index, region in enumerate(destination.regions):
                twice = any(region.overlaps(mine) for mine in destination.regions[:index])
                if twice or any(other.overlaps(region) for other in self._open):
                    raise RegionBusy(
                        f"{region.nbytes} bytes at {region.address:#x} are in use: await `settled`"
                    )
            self._open.append(destination)
        return destination

    def remove(self, destination: Destination) -> None:
        """Forget a destination that ends; `Destination.end` alone calls it."""
        with self._lock:
            self._open.remove(destination)

    def settled(self, region: Region) -> Future[None]:
        """Return a future that is done when nothing can land in `region`."""
        with self._lock:
            waiting = [destination.settled for destination in self._open if destination.overlaps(region)]
        return _after_all(waiting)

    def all_settled(self) -> Future[None]:
        """Return a future that is done when every destination that is open now has ended."""
        with self._lock:
            waiting = [destination.settled for destination in self._open]
        return _after_all(waiting)

    def count(self) -> tuple[int, int]:
        """Count the open destinations, and those of them that are quarantined."""
        with self._lock:
            return len(self._open), sum(destination.quarantined for destination in self._open)


def _after_all(waiting: Sequence[Future[None]]) -> Future[None]:
    """Return a future that is done when all of `waiting` are."""
    done: Future[None] = Future()
    left = len(waiting)
    lock = threading.Lock()

    def count_down(_: Future[None]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            done.set_result(None)

    for one in waiting:
        one.add_done_callback(count_down)
    if not waiting:
        done.set_result(None)
    return done
