"""Count what the store and its parts have done: the values that metrics are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora.peers.peer_stats import PeerStats, PublishStats

Census = Mapping[tuple[str, int], tuple[int, int]]
"""By place (`device` or `elsewhere`) and rank: how many contents, and the device memory that they need."""


@dataclass(frozen=True, slots=True)
class ContentStats:
    """Counts since the start, and how full the arena is. `leases` counts the adapters of all steps."""

    census: Census
    total_pages: int
    free_pages: int
    loads: int
    load_s: float
    evictions: int
    leases: int

    @property
    def resident(self) -> tuple[int, int]:
        """Return how many contents are on the device, and their bytes."""
        here = [counted for (place, _), counted in self.census.items() if place == "device"]
        return sum(count for count, _ in here), sum(nbytes for _, nbytes in here)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the start, and how full the arena is.

    `hits` counts where an adapter was found, by tier; `nbytes` are the bytes that a tier gave, `seconds` how long that
    took. `fallbacks` counts how often a tier was asked in vain.
    """

    resident: int
    resident_bytes: int
    total_pages: int
    free_pages: int
    loads: int
    load_s: float
    evictions: int
    hits: Mapping[str, int]
    fallbacks: Mapping[str, int] = field(default_factory=dict[str, int])
    nbytes: Mapping[str, int] = field(default_factory=dict[str, int])
    census: Census = field(default_factory=dict[tuple[str, int], tuple[int, int]])
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    peers: PeerStats = field(default_factory=PeerStats)
    published: PublishStats = field(default_factory=PublishStats)
