"""Open a node's transport over the network: one control connection to each peer, several paths for the bytes.

Leases, trust and deadlines go over the control connection whichever path moves the bytes. The interface is asyncio;
what blocks runs in threads of its own. The halves are the client, which pulls, and the server, which grants leases.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transport.base import Address, Arena, Lease, Memory, Region
from transport.client import TransportClient
from transport.control.security import Authenticator, Security
from transport.control.threads import run_apart
from transport.errors import RegionRefused
from transport.memory.local_memory import LocalMemory
from transport.paths.base import AUTO, DataPath
from transport.server import TransportServer

ANY_LOCAL_PORT = Address("127.0.0.1", 0)
SETTLE_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Where a node listens, whom it trusts, which path it takes ("auto" or one's name), how long a lease may be."""

    security: Security
    listen: Address = ANY_LOCAL_PORT
    path: str = AUTO
    most_hold_s: float = 60.0


class NetworkTransport:
    """One node on the network; `paths` in order of preference. Use it from one event loop."""

    def __init__(self, name: str, options: NetworkOptions, paths: Sequence[DataPath]) -> None:
        options.security.check_host(options.listen.host)
        self.memory = LocalMemory(name)
        self._paths = tuple(paths)
        authenticator = Authenticator(options.security, self.node)
        self._client = TransportClient(authenticator, self.memory, paths, options.path)
        self._server = TransportServer(options.listen, authenticator, self.memory, paths, options.most_hold_s)
        self._closed = False

    @property
    def node(self) -> str:
        """Return this node's name, unique per incarnation."""
        return self.memory.node

    @property
    def address(self) -> Address:
        """Return where it listens."""
        return self._server.address

    def register(self, memory: Memory) -> Arena:
        """Register as `Transport` says. Raises RegionRefused if no path of this node supports the memory's device."""
        arena = self.memory.register(memory)
        for path in self._paths:
            path.register(arena)
        if not any(path.supports(memory.device) for path in self._paths):
            raise RegionRefused(
                f"device {memory.device}: no path supports its memory; register host memory instead"
            )
        return arena

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """Lease as `Transport` says."""
        return await self._client.lease(peer, name, hold_s)

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """Pull as `Transport` says."""
        await self._client.pull(lease, into, timeout_s)

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        """Fetch as `Transport` says."""
        await self._client.fetch(peer, name, into, timeout_s)

    async def release(self, lease: Lease) -> None:
        """Release as `Transport` says."""
        await self._client.release(lease)

    async def close(self) -> None:
        """Close as `Transport` says. Reads that were given up and go on have SETTLE_S to end."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(self._client.close(), run_apart(self._server.close))
        settled = self.memory.destinations.all_settled()
        await asyncio.wait((asyncio.wrap_future(settled),), timeout=SETTLE_S)
        if not settled.done():
            abandoned, _ = self.memory.destinations.count()
            log.warning(
                "%s closed while bytes of %d abandoned pulls may still land: their arenas are kept until they have",
                self.node,
                abandoned,
            )
        settled.add_done_callback(lambda _: self._close_paths())  # at once if it is done

    def _close_paths(self) -> None:
        for path in self._paths:
            path.close()
