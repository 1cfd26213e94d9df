"""Values and protocol by which a store of adapters asks who makes room for others.

Whoever decides sees pages, steps and seconds only. There is no tensor here, so that decisions need none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol


@dataclass(frozen=True, slots=True, order=True)
class PageRun:
    """Pages `start .. stop - 1` of an arena."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: "PageRun") -> bool:
        """Return whether any page is in both."""
        return self.start < other.stop and other.start < self.stop

    def without(self, other: "PageRun | None") -> "tuple[PageRun, ...]":
        """Return the parts that are not in `other`."""
        if other is None or not self.overlaps(other):
            return (self,)
        parts = (PageRun(self.start, other.start), PageRun(other.stop, self.stop))
        return tuple(part for part in parts if part.start < part.stop)


class Force(IntEnum):
    """How far an adapter may go to get its pages."""

    FREE_PAGES = 0  # take what is free
    UNUSED = 1  # displace what no live request uses
    NOT_RUNNING = 2  # displace also what live requests use but have not run for a while
    IDLE = 3  # nothing runs: displace whatever had its chance and is not leased
    CLEAR = 4  # choose a window that is to be emptied in time, whatever runs there now


class Claim(Enum):
    """What holds an occupant on its pages."""

    UNUSED = "unused"  # nothing: no live request uses it
    RETAINED = "retained"  # live requests use it
    PINNED = "pinned"  # a step runs it, or its bytes are being written
    LEAVING = "leaving"  # it is displaced already, and its pages will be free


@dataclass(frozen=True, slots=True)
class Usage:
    """When an adapter was used, in steps.

    `uses` is a decayed count of the steps that ran it, as of `used_step`, when one did last or it was placed.
    """

    uses: float = 0.0
    used_step: int = 0
    placed_step: int = 0


@dataclass(frozen=True, slots=True)
class Occupant:
    """Pages that are taken, and what is known of the adapter in them; `reload_s` is what a reload takes."""

    run: PageRun
    claim: Claim
    usage: Usage = Usage()
    reload_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request for `pages` neighbouring pages of an arena of `num_pages`, at `step`."""

    pages: int
    num_pages: int
    force: Force
    step: int


class ResidencyPolicy(Protocol):
    """Decides who makes room. It keeps no state: equal arguments give equal answers."""

    def displaced(self, request: PageRequest, occupants: Sequence[Occupant]) -> tuple[Occupant, ...] | None:
        """Choose who goes for the request's sake; None if the pages cannot be had now.

        `occupants` are disjoint, in any order. The answer is in order of pages, and empty where pages that are
        leaving suffice.
        """
        ...

    def ran(self, usage: Usage, step: int) -> Usage:
        """Return the usage of an adapter that `step` runs too."""
        ...

    def placed(self, usage: Usage, step: int) -> Usage:
        """Return the usage of an adapter whose bytes have arrived at `step`."""
        ...
