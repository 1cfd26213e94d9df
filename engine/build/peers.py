"""Peers: a node's transport, opened from its options, and the adapters that it shares through it.

The only place where options become trust, doors and limits. What travels is lora's business, how is transport's.
"""

import ssl

from engine.config.config import PeerConfig
from engine.config.trust import trust
from engine.errors import InvalidConfig
from lora.memory.pages import RankPages
from lora.peers.directory import StaticDirectory
from lora.peers.loop_thread import LoopThread
from lora.peers.peer_tier import Peering, PeerTier
from lora.peers.publisher import Publisher
from lora.peers.puller import Puller, PullLimits
from lora.peers.regions import ManifestBuffers, PageRegions
from transport.base import Address
from transport.errors import PathUnavailable
from transport.network import ANY_LOCAL_PORT, NetworkOptions, NetworkTransport
from transport.paths.choice import open_paths

_NOTES_BYTES = 16 << 20
_MOST_ROOM_BYTES = 1 << 30


class Peers:
    """A node among others of the same base model (`base` is its digest): what it lends of `pages`, and whom it asks
    for what it lacks. Raises InvalidConfig."""

    def __init__(self, config: PeerConfig, base: str, pages: RankPages) -> None:
        self._loop = LoopThread()
        try:
            self._transport = self._loop.wait(_open(config))
            shared = PageRegions(self._transport, pages)
        except InvalidConfig:
            self._loop.close()
            raise
        notebook = ManifestBuffers(self._transport, _NOTES_BYTES)
        puller = Puller(
            self._transport, notebook, PullLimits(config.pulls, bytes_per_s=config.bandwidth_bytes_per_s)
        )
        directory = StaticDirectory(config.peers)
        tier = PeerTier(base, self._transport, self._loop, shared, directory, puller)
        room = RankPages(max(1, _room_bytes(config, pages) // pages.page_bytes), pages.page_bytes)
        self._lending = Publisher(base, self._transport, shared, notebook, room)
        self.peering = Peering(tier, self._lending, config.review_s)

    @property
    def address(self) -> Address:
        """Where peers reach this node."""
        return self._transport.address

    def close(self) -> None:
        """Lend and pull no more; pulls under way fail. It ends in bounded time."""
        try:
            self._loop.wait(self._transport.close())
            self._lending.close()
        finally:
            self._loop.close()


def _room_bytes(config: PeerConfig, pages: RankPages) -> int:
    """Room for copies that are lent: as much as is needed to lend any adapter, within reason."""
    return config.lend_bytes or min(pages.nbytes, _MOST_ROOM_BYTES)


async def _open(config: PeerConfig) -> NetworkTransport:
    listen = config.listen or ANY_LOCAL_PORT
    try:
        options = NetworkOptions(trust(config), listen, config.door)
        return NetworkTransport("node", options, open_paths("node", config.door))
    except PathUnavailable as error:
        raise InvalidConfig("peer_door", config.door, str(error)) from error
    except ssl.SSLError as error:
        raise InvalidConfig(
            "peer_tls_cert",
            str(config.tls_cert),
            f"{error.reason}: check it, and what --peer-tls-ca and --peer-tls-key name",
        ) from error
    except OSError as error:
        raise InvalidConfig("peer_listen", str(listen), f"it cannot be bound ({error.strerror})") from error
