"""Pull adapters from other nodes' memory. What is pulled is checked by its digest.

The store's workers call it, and may wait; the transport lives on an event loop in a thread of its own.
"""

import logging
import threading
import time
from concurrent.futures import wait
from dataclasses import dataclass

from torch import Tensor

from lora.adapter import AdapterRef, RemoteName
from lora.errors import BytesMayLand
from lora.format.packed import PackedLayout, digest_of
from lora.peers.directory import Directory, ReportedDirectory
from lora.peers.discovery import NameDiscovery
from lora.peers.loop_thread import LoopThread
from lora.peers.manifest import Manifest, weights_name
from lora.peers.peer_stats import PeerStats
from lora.peers.publisher import Publisher
from lora.peers.puller import Puller
from lora.peers.regions import PageRegions
from transport.base import Address, Region, Transport
from transport.errors import NotOffered, TransportError

_SETTLING_S = 2.0
_log = logging.getLogger(__name__)


class PeerTier:
    """A `Tier` that pulls into the arena itself, from one holder after another. Any thread may call every method.

    `_lock` guards the layouts and the counts, and nothing is called under it.
    """

    name = "peer"

    def __init__(
        self,
        base: str,
        transport: Transport,
        loop: LoopThread,
        pages: PageRegions,
        directory: Directory,
        puller: Puller,
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._pages = pages
        self._directory = directory
        self._puller = puller
        self._discovery = NameDiscovery(base, puller, directory)
        self._lock = threading.Lock()
        self._layouts: dict[str, PackedLayout] = {}
        self._stats = PeerStats()

    @property
    def stats(self) -> PeerStats:
        """A snapshot."""
        return self._stats

    def cost_s(self, nbytes: int) -> float:
        """Estimate at a good network's speed."""
        return 5e-4 + nbytes / 2e9

    def look_up(self, name: str) -> Manifest:
        """Ask what `name` means at a peer. UnknownAdapter, AdapterUnreachable."""
        return self._loop.wait(self._discovery.find(name))

    def look_up_content(self, ref: AdapterRef) -> Manifest:
        """Ask how a content is laid out. UnknownAdapter, AdapterUnreachable."""
        return self._loop.wait(self._discovery.find_content(ref))

    def confirm(self, remote: RemoteName) -> Manifest:
        """Ask what a remote name means now. UnknownAdapter, AdapterUnreachable."""
        return self._loop.wait(self._discovery.confirm(remote))

    def remember(self, digest: str, layout: PackedLayout) -> None:
        """Note a content's layout: what is pulled as `digest` is checked against both."""
        with self._lock:
            self._layouts[digest] = layout

    def forget(self, digest: str) -> None:
        """Forget a content that nobody will ask for again."""
        with self._lock:
            self._layouts.pop(digest, None)

    def fetch(self, digest: str, destination: Tensor) -> bool:
        """Pull into `destination`, which lies in the arena. BytesMayLand if a pull that was given up goes on."""
        with self._lock:
            layout = self._layouts.get(digest)
        if layout is None:
            return False
        region = self._pages.region_of(destination, layout.nbytes)
        return any(
            self._pull(holder, digest, region) and self._is_sound(holder, digest, layout, destination)
            for holder in self._directory.holders(digest)
        )

    def _pull(self, holder: Address, digest: str, into: Region) -> bool:
        started_s = time.perf_counter()
        try:
            self._loop.wait(self._puller.pull(holder, weights_name(digest), into))
        except NotOffered:
            self._count(PeerStats(absent=1))
            return False
        except TransportError as error:
            _log.warning("adapter %s cannot be had from %s: %s", digest[:12], holder, error)
            self._count(PeerStats(failed=1))
            self._wait_settled(into)
            return False
        self._count(PeerStats(pulls=1, nbytes=into.nbytes, seconds=time.perf_counter() - started_s))
        return True

    def _is_sound(self, holder: Address, digest: str, layout: PackedLayout, destination: Tensor) -> bool:
        found = digest_of(layout, destination[: layout.nbytes].cpu())
        if found == digest:
            return True
        _log.error("%s gave %s for adapter %s: refused", holder, found[:12], digest[:12])
        self._count(PeerStats(refused=1))
        return False

    def _wait_settled(self, region: Region) -> None:
        """Wait a little for what may still land there; BytesMayLand if that is not enough."""
        settled = self._transport.memory.settled(region)
        if wait((settled,), _SETTLING_S).not_done:
            raise BytesMayLand(settled)

    def _count(self, more: PeerStats) -> None:
        with self._lock:
            self._stats += more


@dataclass(frozen=True, slots=True)
class Peering:
    """Both sides of sharing adapters with peers.

    Names that they told are asked for again every `refresh_s`, or only when somebody calls the refresher if it is None.
    `directory` is whom a coordinator said to ask, for a node of a cluster.
    """

    tier: PeerTier
    publisher: Publisher
    refresh_s: float | None = None
    directory: ReportedDirectory | None = None
