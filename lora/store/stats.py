"""Count what the store and its parts have done: the values that metrics are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora.peers.peer_tier import PeerStats
from lora.peers.published_weights import PublishStats


@dataclass(frozen=True, slots=True)
class ContentStats:
    """Counts since the start, and how full the arena is. `leases` counts the adapters of all steps."""

    resident: int
    resident_bytes: int
    total_pages: int
    free_pages: int
    loads: int
    load_s: float
    evictions: int
    leases: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the start, and how full the arena is.

    `hits` counts where an adapter was found, by tier, and `seconds` how long what a tier gave took. `fallbacks`
    counts how often a tier was asked in vain.
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
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    peers: PeerStats = field(default_factory=PeerStats)
    published: PublishStats = field(default_factory=PublishStats)
