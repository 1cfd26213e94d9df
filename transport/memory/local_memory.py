"""Keep account of one node's memory: its arenas, what is published of them, and what pulls write to.

Every transport has one; it keeps the rule that no byte is published while it may still change.
"""

import itertools
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from transport.base import HOST, Arena, Bring, Memory, Region, TransportUsage
from transport.errors import RegionBusy, RegionRefused
from transport.memory.destinations import Destination, Destinations
from transport.memory.leases import LeaseTable

BRING_SHARE = (
    0.8  # of a lease's time may pass until its bytes are brought, so that the asker still hears the answer
)


class LocalMemory:
    """Arenas, shelf and landings of one incarnation of a node; safe to use from any thread."""

    def __init__(self, name: str) -> None:
        self.node = f"{name}-{secrets.token_hex(6)}"
        self.shelf = LeaseTable()
        self.landings = Destinations()
        self._keys = itertools.count(1)
        self._pulled: Counter[str] = Counter()
        self.bring: Bring = lambda name: None
        self._lock = threading.Lock()  # held over "is it free" and "then it is mine"

    def register(self, memory: Memory) -> Arena:
        """Number the memory."""
        if memory.nbytes < 1 or memory.address < 1:
            raise RegionRefused(f"{memory.nbytes} bytes at {memory.address:#x}: register a span that exists")
        view = memory.view() if memory.device == HOST else None
        return Arena(self.node, next(self._keys), memory, view)

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """Lend `regions` as `name`, if they are this node's and nothing lands there."""
        self._check(regions)
        with self._lock:
            if not all(self.landings.settled(region).done() for region in regions):
                raise RegionBusy(f"bytes may still land in {name!r}: await `settled`, then publish it")
            self.shelf.publish(name, regions)

    def land(self, into: Sequence[Region]) -> Destination:
        """Claim `into` as a destination, if they are this node's and nobody reads there."""
        self._check(into)
        with self._lock:
            for region in into:
                if self.shelf.lends(region):
                    where = f"{region.nbytes} bytes at {region.address:#x}"
                    raise RegionBusy(f"{where} are lent out: await `withdraw` first")
            return self.landings.begin(into)

    def settled(self, region: Region) -> Future[None]:
        """Done when nothing can land in `region`."""
        return self.landings.settled(region)

    def usage(self) -> TransportUsage:
        """Counts of what is held now."""
        landings, quarantined = self.landings.count()
        with self._lock:
            pulled = dict(self._pulled)
        return TransportUsage(
            self.shelf.names(), self.shelf.leases(), landings, quarantined, self.shelf.endings(), pulled
        )

    def count_pull(self, door: str, nbytes: int) -> None:
        """These bytes have come whole."""
        with self._lock:
            self._pulled[door] += nbytes

    def _check(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if region.arena.node != self.node:
                raise RegionRefused(
                    f"arena {region.arena.key} belongs to {region.arena.node}: register it here first"
                )
