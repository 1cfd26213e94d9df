"""NetworkTransport: nodes in different processes or on different machines. One control connection, several doors.

Leases, trust and deadlines go over the control connection whichever door moves the bytes. The interface is asyncio;
what blocks runs in threads of its own, and a thread that has begun to move bytes always finishes its landing, even
when the coroutine that asked for it was cancelled.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from transport.base import Address, Arena, Bring, Lease, Memory, Region, TransportUsage
from transport.client import TransportClient
from transport.control.security import Authenticator, Security
from transport.errors import RegionRefused
from transport.memory.local_memory import LocalMemory
from transport.paths.base import AUTO, DataPath
from transport.server import TransportServer

ANY_LOCAL_PORT = Address("127.0.0.1", 0)
PARTING_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Where a node listens, whom it trusts, which door it takes ("auto" or one's name), how long it lends."""

    security: Security
    listen: Address = ANY_LOCAL_PORT
    door: str = AUTO
    most_hold_s: float = 60.0


class NetworkTransport:
    """One node on the network; `doors` in order of preference. Use it from one event loop."""

    def __init__(self, name: str, options: NetworkOptions, doors: Sequence[DataPath]) -> None:
        options.security.check_host(options.listen.host)
        self._holdings = LocalMemory(name)
        self._doors = tuple(doors)
        guard = Authenticator(options.security, self.node)
        self._visitor = TransportClient(guard, self._holdings, doors, options.door)
        self._source = TransportServer(options.listen, guard, self._holdings, doors, options.most_hold_s)
        self._closed = False

    @property
    def node(self) -> str:
        """This node's name, unique per incarnation."""
        return self._holdings.node

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._source.address

    def register(self, memory: Memory) -> Arena:
        """See `Transport`. RegionRefused if no door of this node carries the memory's device."""
        arena = self._holdings.register(memory)
        for door in self._doors:
            door.register(arena)
        if not any(door.carries(memory.device) for door in self._doors):
            raise RegionRefused(
                f"device {memory.device}: no door carries its memory; register host memory instead"
            )
        return arena

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """See `Transport`."""
        self._holdings.publish(name, regions)

    def withdraw(self, name: str) -> Future[None]:
        """See `Transport`."""
        return self._holdings.shelf.withdraw(name)

    def settled(self, region: Region) -> Future[None]:
        """See `Transport`."""
        return self._holdings.settled(region)

    def usage(self) -> TransportUsage:
        """See `Transport`."""
        return self._holdings.usage()

    def lend_on_demand(self, bring: Bring) -> None:
        """See `Transport`."""
        self._holdings.bring = bring

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """See `Transport`."""
        return await self._visitor.lease(peer, name, hold_s)

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """See `Transport`."""
        await self._visitor.pull(lease, into, timeout_s)

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        """See `Transport`."""
        await self._visitor.fetch(peer, name, into, timeout_s)

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        await self._visitor.release(lease)

    async def close(self) -> None:
        """See `Transport`. Reads that were given up and go on have PARTING_S to end."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(self._visitor.close(), asyncio.to_thread(self._source.close))
        settled = self._holdings.landings.all_settled()
        await asyncio.wait((asyncio.wrap_future(settled),), timeout=PARTING_S)
        if not settled.done():
            landings, _ = self._holdings.landings.count()
            log.warning(
                "%s closed while bytes of %d abandoned pulls may still land: their arenas are kept until they have",
                self.node,
                landings,
            )
        settled.add_done_callback(lambda _: self._close_doors())  # at once if it is done

    def _close_doors(self) -> None:
        for door in self._doors:
            door.close()
