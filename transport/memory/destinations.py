"""Destinations: the destinations into which bytes may still come. They outlive the pull that began them.

A read that was given up cannot always be stopped: its remaining bytes land whenever the network delivers them. So
a destination belongs to its landing until whoever moves the bytes says that the last one has come or never will.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from transport.base import Lease, Region
from transport.errors import RegionBusy, RegionRefused


@dataclass(slots=True, eq=False)
class Destination:
    """One destination in use. Whoever moves its bytes must `end` it exactly once."""

    regions: tuple[Region, ...]
    book: "Destinations" = field(repr=False)
    quarantined: bool = False
    settled: Future[None] = field(default_factory=Future)

    @property
    def nbytes(self) -> int:
        """Room for so many bytes."""
        return sum(region.nbytes for region in self.regions)

    def check(self, lease: Lease) -> None:
        """RegionRefused unless the lease's bytes fill it."""
        if lease.nbytes != self.nbytes:
            raise RegionRefused(
                f"{lease.name!r} has {lease.nbytes} bytes, its destination {self.nbytes}: make them equal"
            )

    def quarantine(self) -> None:
        """The pull has been given up, but bytes may still come."""
        self.quarantined = True

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End it if this fails: no byte is on its way yet."""
        try:
            yield
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """No byte can land there any more."""
        self.book.forget(self)
        self.settled.set_result(None)

    def overlaps(self, region: Region) -> bool:
        """True if bytes may land in `region`."""
        return any(region.overlaps(mine) for mine in self.regions)


class Destinations:
    """All destinations in use; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Destination] = []

    def begin(self, regions: Sequence[Region]) -> Destination:
        """Claim `regions`; RegionBusy if one is claimed already or two of them overlap."""
        landing = Destination(tuple(regions), self)
        with self._lock:
            for index, region in enumerate(landing.regions):
                twice = any(region.overlaps(mine) for mine in landing.regions[:index])
                if twice or any(other.overlaps(region) for other in self._open):
                    raise RegionBusy(
                        f"{region.nbytes} bytes at {region.address:#x} are in use: await `settled`"
                    )
            self._open.append(landing)
        return landing

    def forget(self, landing: Destination) -> None:
        """For `Destination.end`: it is open no more."""
        with self._lock:
            self._open.remove(landing)

    def settled(self, region: Region) -> Future[None]:
        """Done when nothing can land in `region`."""
        with self._lock:
            waiting = [landing.settled for landing in self._open if landing.overlaps(region)]
        return _after_all(waiting)

    def all_settled(self) -> Future[None]:
        """Done when every landing that is open now has ended."""
        with self._lock:
            waiting = [landing.settled for landing in self._open]
        return _after_all(waiting)

    def count(self) -> tuple[int, int]:
        """Open landings, and how many of them are quarantined."""
        with self._lock:
            return len(self._open), sum(landing.quarantined for landing in self._open)


def _after_all(waiting: Sequence[Future[None]]) -> Future[None]:
    """Done when all of `waiting` are."""
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
