"""Pull from peers within limits. Coroutines, for the transport's event loop only.

It knows names and regions, not adapters. A peer that failed is not asked for a while, so that a dead one costs its
deadline once and not once per adapter.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from lora.peers.manifest import MOST_MANIFEST_BYTES
from lora.peers.regions import ManifestBuffers
from transport.base import Address, Region, Transport
from transport.errors import HelloRefused, PathUnavailable, PeerGone, PullTimeout, RegionRefused, WireError

_PEER_FAILURES = (PeerGone, PullTimeout, HelloRefused, WireError, PathUnavailable)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PullLimits:
    """How hard each peer may be asked.

    `pulls` at once; `bytes_per_s` on average, None without bound. A manifest may take `lookup_s`, rows `patience_s` and
    as long as `slowest_bytes_per_s` would take. A peer that failed is not asked for `backoff_s`.
    """

    pulls: int = 2
    bytes_per_s: float | None = None
    lookup_s: float = 5.0
    patience_s: float = 5.0
    slowest_bytes_per_s: float = 25e6
    backoff_s: float = 2.0


class Puller:
    """Pulls rows and reads manifests."""

    def __init__(self, transport: Transport, buffers: ManifestBuffers, limits: PullLimits) -> None:
        self._transport = transport
        self._buffers = buffers
        self._limits = limits
        self._pulls = defaultdict[Address, asyncio.Semaphore](lambda: asyncio.Semaphore(limits.pulls))
        self._free_at_s = defaultdict[Address, float](float)  # when what was asked is within `bytes_per_s`
        self._failed_until_s: dict[Address, float] = {}

    async def pull(self, peer: Address, name: str, into: Region) -> None:
        """Fill `into` with what `peer` publishes as `name`. TransportError; see Transport.pull for what that leaves."""
        within_s = self._limits.patience_s + into.nbytes / self._limits.slowest_bytes_per_s
        async with self._pulls[peer]:
            await self._pace(peer, into.nbytes)
            with self._backing_off(peer):
                await self._transport.fetch(peer, name, [into], within_s)

    async def read(self, peer: Address, name: str) -> bytes:
        """Read the manifest that `peer` publishes as `name`. TransportError."""
        within_s = self._limits.lookup_s
        with self._backing_off(peer):
            lease = await self._transport.lease(peer, name, within_s)
            taken = self._buffers.take(lease.nbytes) if lease.nbytes <= MOST_MANIFEST_BYTES else None
            if taken is None:
                await self._transport.release(lease)
                raise RegionRefused(f"{name!r} has {lease.nbytes} bytes at {peer}: no room for it here")
            region, give_back = taken
            try:
                await self._transport.pull(lease, [region], within_s)
                return bytes(region.view())
            finally:
                self._transport.memory.settled(region).add_done_callback(lambda _: give_back())

    @contextmanager
    def _backing_off(self, peer: Address) -> Generator[None]:
        """Ask `peer` no more for a while if it fails; PeerGone at once during that while."""
        if time.monotonic() < self._failed_until_s.get(peer, 0.0):
            raise PeerGone(f"{peer} failed a moment ago: use another source")
        try:
            yield
        except _PEER_FAILURES as error:
            self._failed_until_s[peer] = time.monotonic() + self._limits.backoff_s
            _log.warning("peer %s is not asked for %g s: %s", peer, self._limits.backoff_s, error)
            raise

    async def _pace(self, peer: Address, nbytes: int) -> None:
        """Wait until `nbytes` more are within the peer's average."""
        if self._limits.bytes_per_s is None:
            return
        begin_s = max(time.monotonic(), self._free_at_s[peer])
        self._free_at_s[peer] = begin_s + nbytes / self._limits.bytes_per_s
        await asyncio.sleep(begin_s - time.monotonic())
