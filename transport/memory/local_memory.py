"""Keep account of one node's memory: its arenas, what is published of them, and what pulls write to.

Every transport has one; it keeps the rule that no byte is published while it may still change.
"""

import itertools
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from transport.base import HOST, Arena, Memory, PublishOnDemand, Region, TransportUsage
from transport.errors import RegionBusy, RegionRefused
from transport.memory.destinations import Destination, Destinations
from transport.memory.leases import LeaseTable

ON_DEMAND_SHARE = 0.8
"""So much of a lease's time may pass until its name is published; the rest is for the answer to arrive."""


class LocalMemory:
    """Arenas, leases and destinations of one incarnation of a node. Implements `NodeMemory`."""

    def __init__(self, name: str) -> None:
        self.node = f"{name}-{secrets.token_hex(6)}"
        self.leases = LeaseTable()
        self.destinations = Destinations()
        self.on_demand: PublishOnDemand = lambda name: None
        self._keys = itertools.count(1)
        self._pulled: Counter[str] = Counter()
        self._lock = threading.Lock()  # held over "is it free" and "then it is mine"

    def register(self, memory: Memory) -> Arena:
        """Number the memory. Raises RegionRefused where there can be none."""
        if memory.nbytes < 1 or memory.address < 1:
            raise RegionRefused(f"{memory.nbytes} bytes at {memory.address:#x}: register a span that exists")
        view = memory.view() if memory.device == HOST else None
        return Arena(self.node, next(self._keys), memory, view)

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """Let peers read `regions` as `name`, if they are this node's and nothing lands there."""
        self._check(regions)
        with self._lock:
            if not all(self.destinations.settled(region).done() for region in regions):
                raise RegionBusy(f"bytes may still land in {name!r}: await `settled`, then publish it")
            self.leases.publish(name, regions)

    def withdraw(self, name: str) -> Future[None]:
        """Let nobody lease `name` any more; the future is done when its last lease has ended."""
        return self.leases.withdraw(name)

    def publish_on_demand(self, publish: PublishOnDemand) -> None:
        """Ask `publish` for every unpublished name that a peer asks for."""
        self.on_demand = publish

    def claim(self, into: Sequence[Region]) -> Destination:
        """Claim `into` for a pull, if they are this node's and nobody reads there."""
        self._check(into)
        with self._lock:
            for region in into:
                if self.leases.holds(region):
                    where = f"{region.nbytes} bytes at {region.address:#x}"
                    raise RegionBusy(f"{where} are published: await `withdraw` first")
            return self.destinations.claim(into)

    def settled(self, region: Region) -> Future[None]:
        """Return a future that is done when nothing can land in `region`."""
        return self.destinations.settled(region)

    def usage(self) -> TransportUsage:
        """Count what is held now."""
        destinations, quarantined = self.destinations.count()
        with self._lock:
            pulled = dict(self._pulled)
        return TransportUsage(
            self.leases.names(),
            self.leases.leases(),
            destinations,
            quarantined,
            self.leases.endings(),
            pulled,
        )

    def count_pull(self, path: str, nbytes: int) -> None:
        """Count bytes that have come whole."""
        with self._lock:
            self._pulled[path] += nbytes

    def _check(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if region.arena.node != self.node:
                raise RegionRefused(
                    f"arena {region.arena.key} belongs to {region.arena.node}: register it here first"
                )
