"""Open a node's transport from its options, and what it shares with its peers through it.

The only place where options become trust, data paths and limits. It may not know what travels, which is lora's
business, nor how, which is transport's.
"""

import ssl

import torch

from engine.base.machine_memory import available_bytes
from engine.config.peer_config import PeerConfig, trust
from engine.errors import InvalidConfig
from lora.memory.pages import RankPages
from lora.peers.directory import KnownHolders, ReportedDirectory
from lora.peers.loop_thread import LoopThread
from lora.peers.peer_tier import Peering, PeerTier
from lora.peers.publisher import Publisher
from lora.peers.puller import Puller, PullLimits
from lora.peers.regions import ManifestBuffers, PageRegions
from transport.base import Address
from transport.errors import PathUnavailable
from transport.network import ANY_LOCAL_PORT, NetworkOptions, NetworkTransport
from transport.paths.choice import open_paths

_MANIFEST_BYTES = 16 << 20
_MOST_COPY_BYTES = 1 << 30


class Peers:
    """A node among others of the same base model: what it publishes of its pages, and whom it asks for adapters."""

    def __init__(self, config: PeerConfig, base_digest: str, pages: RankPages) -> None:
        """Open the transport. Raises InvalidConfig."""
        self._loop = LoopThread()
        try:
            self._transport = self._loop.wait(_open(config))
            regions = PageRegions(self._transport, pages)
        except InvalidConfig:
            self._loop.close()
            raise
        manifests = ManifestBuffers(self._transport, _MANIFEST_BYTES)
        limits = PullLimits(config.pulls, bytes_per_s=config.bandwidth_bytes_per_s)
        puller = Puller(self._transport, manifests, limits)
        directory = ReportedDirectory(KnownHolders(config.addresses))
        tier = PeerTier(base_digest, self._transport, self._loop, regions, directory, puller)
        copies = _copies(config, pages)
        self._publisher = Publisher(base_digest, self._transport, regions, manifests, copies)
        self.peering = Peering(tier, self._publisher, config.refresh_s, directory)

    @property
    def address(self) -> Address:
        """Return where peers reach this node."""
        return self._transport.address

    def close(self) -> None:
        """Publish and pull no more; pulls under way fail. It ends in bounded time."""
        try:
            self._loop.wait(self._transport.close())
            self._publisher.close()
        finally:
            self._loop.close()


def _copies(config: PeerConfig, pages: RankPages) -> RankPages:
    """Allocate the memory for published copies. Raises InvalidConfig."""
    granted = _copy_bytes(config, pages)
    try:
        return RankPages(max(1, granted // pages.page_bytes), pages.page_bytes)
    except (
        RuntimeError,
        MemoryError,
        OverflowError,
    ) as error:  # what torch raises where the system gives it no memory
        left = available_bytes(torch.device("cpu"))
        remedy = f"this machine has {left} bytes left: give less"
        raise InvalidConfig("peer_publish_bytes", granted, remedy) from error


def _copy_bytes(config: PeerConfig, pages: RankPages) -> int:
    """Return the memory for published copies: as much as publishing any adapter needs, within reason."""
    return config.publish_bytes or min(pages.nbytes, _MOST_COPY_BYTES)


async def _open(config: PeerConfig) -> NetworkTransport:
    listen = config.listen or ANY_LOCAL_PORT
    try:
        options = NetworkOptions(trust(config), listen, config.path)
        return NetworkTransport("node", options, open_paths("node", config.path))
    except PathUnavailable as error:
        raise InvalidConfig("peer_path", config.path, str(error)) from error
    except ssl.SSLError as error:
        remedy = f"{error.reason}: check it, and what --peer-tls-ca and --peer-tls-key name"
        raise InvalidConfig("peer_tls_cert", str(config.tls_cert), remedy) from error
    except OSError as error:
        raise InvalidConfig("peer_listen", str(listen), f"it cannot be bound ({error.strerror})") from error
