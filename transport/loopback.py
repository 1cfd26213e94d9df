"""Connect several nodes of one process: the oracle of the other transports, and the fake of other tests.

Leases, destinations and deadlines are real; only the network is missing.
"""

import asyncio
import ctypes
import time
from collections.abc import Sequence

from transport.base import Address, Arena, Lease, Memory, Region, RemoteRegion
from transport.errors import LeaseExpired, NotOffered, PeerGone, PullTimeout, TransportClosed
from transport.memory.leases import Ending
from transport.memory.local_memory import ON_DEMAND_SHARE, LocalMemory
from transport.memory.spans import pair, spans

PIECE_BYTES = 16 << 20


class LoopbackNetwork:
    """The nodes of this process that can reach each other."""

    def __init__(self) -> None:
        self._nodes: dict[Address, LoopbackTransport] = {}

    def join(self, transport: "LoopbackTransport") -> Address:
        """Add a node and return its address."""
        address = Address("loopback", len(self._nodes) + 1)
        self._nodes[address] = transport
        return address

    def find(self, address: Address) -> "LoopbackTransport":
        """Return the open node at `address`. Raises PeerGone if there is none."""
        found = self._nodes.get(address)
        if found is None or found.closed:
            raise PeerGone(f"{address}: no node there; use another source")
        return found


class LoopbackTransport:
    """A node whose peers live in the same process and event loop."""

    def __init__(self, name: str, network: LoopbackNetwork, most_hold_s: float = 60.0) -> None:
        self.memory = LocalMemory(name)
        self._network = network
        self._most_hold_s = most_hold_s
        self._expiries: dict[int, asyncio.TimerHandle] = {}
        self._sources: dict[int, LoopbackTransport] = {}
        self.closed = False
        self._address = network.join(self)

    @property
    def node(self) -> str:
        """Return this node's name, unique per incarnation."""
        return self.memory.node

    @property
    def address(self) -> Address:
        """Return its place in the network."""
        return self._address

    def register(self, memory: Memory) -> Arena:
        """Register as `Transport` says; host memory only."""
        return self.memory.register(memory)

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """Lease as `Transport` says."""
        self._refuse_if_closed()
        source = self._network.find(peer)
        hold_s = min(hold_s, source._most_hold_s)
        try:
            lease = source._grant(name, hold_s)
        except NotOffered:
            coming = source.memory.on_demand(name)
            if coming is None:
                raise
            await asyncio.wait((asyncio.wrap_future(coming),), timeout=ON_DEMAND_SHARE * hold_s)
            lease = source._grant(name, hold_s)
        self._sources[lease.ticket] = source
        return lease

    async def release(self, lease: Lease) -> None:
        """Release as `Transport` says."""
        source = self._sources.pop(lease.ticket, None)
        if source is not None:
            source._end(lease.ticket, Ending.RELEASED)

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """Pull as `Transport` says."""
        self._refuse_if_closed()
        source = self._sources.pop(lease.ticket, None)
        if source is None or lease.ticket not in source._expiries:
            raise LeaseExpired(f"{lease.name!r}: this lease has ended; lease again")
        try:
            await self._copy(lease, into, time.monotonic() + timeout_s)
        except BaseException:
            source._end(lease.ticket, Ending.RELEASED)
            raise
        if source.closed:
            raise PeerGone(f"{lease.node} closed during the pull; use another source")
        if not source._end(lease.ticket, Ending.READ):
            raise LeaseExpired(f"{lease.name!r} expired during the pull; lease it for longer")
        self.memory.count_pull("loopback", lease.nbytes)

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        """Fetch as `Transport` says."""
        await self.pull(await self.lease(peer, name, timeout_s), into, timeout_s)

    async def close(self) -> None:
        """Close as `Transport` says."""
        self.closed = True
        for ticket in list(self._expiries):
            self._end(ticket, Ending.GONE)
        for ticket, source in self._sources.items():
            source._end(ticket, Ending.GONE)
        self._sources.clear()
        await asyncio.wrap_future(self.memory.destinations.all_settled())  # its copies end by themselves

    async def _copy(self, lease: Lease, into: Sequence[Region], until_s: float) -> None:
        destination = self.memory.claim(into)
        try:
            destination.check(lease)
            for source, target, nbytes in pair(spans(lease.regions), spans(into), PIECE_BYTES):
                if time.monotonic() >= until_s:
                    raise PullTimeout(f"{lease.name!r}: out of time; use another source or allow more")
                ctypes.memmove(target, source, nbytes)
                await asyncio.sleep(0)
        finally:
            destination.end()

    def _grant(self, name: str, hold_s: float) -> Lease:
        ticket, regions = self.memory.leases.open(name)
        expire = asyncio.get_running_loop().call_later(hold_s, self._end, ticket, Ending.EXPIRED)
        self._expiries[ticket] = expire
        remote = tuple(
            RemoteRegion(self.node, one.arena.key, one.address, one.nbytes, one.device, ticket)
            for one in regions
        )
        return Lease(self.node, name, ticket, hold_s, remote)

    def _end(self, ticket: int, ending: Ending) -> bool:
        """End the lease unless it has ended, and tell if it had not."""
        expiry = self._expiries.pop(ticket, None)
        if expiry is None:
            return False
        expiry.cancel()
        self.memory.leases.end(ticket, ending)
        return True

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise TransportClosed(f"{self.node} is closed: open another transport")
