"""Tell where the contents of one store are: on the device, in host memory, on disk, or in a folder only."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora.store.store import AdapterStore


@dataclass(frozen=True, slots=True)
class ArenaUse:
    """The memory for adapters on the device, and how many adapters are there."""

    total_bytes: int
    used_bytes: int
    resident: int


class AdapterPlaces:
    """The tiers of one store, as administrators see them."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def tiers(self, digests: Iterable[str]) -> dict[str, str]:
        """Name the nearest tier of each known content, by digest. It may wait for the disk."""
        places = self.places()
        known = [digest for digest in digests if digest in places]
        absent = [digest for digest in known if places[digest] != "device"]
        nearest = self._store.tiers_of(absent) if absent else {}
        return {digest: "device" if places[digest] == "device" else nearest[digest] for digest in known}

    def places(self) -> dict[str, str]:
        """Tell of each known content, by digest, whether it is on the device; it never waits."""
        return self._store.contents.places()[0]

    def memory(self) -> ArenaUse:
        """Count the device memory for adapters."""
        stats = self._store.stats()
        page_bytes = self._store.page_bytes
        used = stats.total_pages - stats.free_pages
        return ArenaUse(stats.total_pages * page_bytes, used * page_bytes, stats.resident)
