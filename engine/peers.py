"""Peers: a node's transport, opened from its options, and the adapters that it shares through it.

The only place where options become trust, doors and limits. What travels is lora's business, how is transport's.
"""

import ssl
from pathlib import Path

from engine.config import PEER_TOKEN_VARIABLE, PeerConfig
from engine.errors import InvalidConfig
from lora.directory import StaticDirectory
from lora.lending import Lending
from lora.peer import Peering, PeerTier
from lora.peer_loop import PeerLoop
from lora.pool import RankPages
from lora.puller import Puller, PullLimits
from lora.shared_pages import Notebook, SharedPages
from transport.base import Address
from transport.doors import open_doors
from transport.errors import DoorUnavailable, HelloRefused
from transport.network import ANY_LOCAL_PORT, NetworkOptions, NetworkTransport
from transport.security import Security, TlsFiles

_NOTES_BYTES = 16 << 20
_MOST_ROOM_BYTES = 1 << 30


class Peers:
    """A node among others of the same base model (`base` is its digest): what it lends of `pages`, and whom it asks
    for what it lacks. Raises InvalidConfig."""

    def __init__(self, config: PeerConfig, base: str, pages: RankPages) -> None:
        self._loop = PeerLoop()
        try:
            self._transport = self._loop.wait(_open(config))
            shared = SharedPages(self._transport, pages)
        except InvalidConfig:
            self._loop.close()
            raise
        notebook = Notebook(self._transport, _NOTES_BYTES)
        puller = Puller(
            self._transport, notebook, PullLimits(config.pulls, bytes_per_s=config.bandwidth_bytes_per_s)
        )
        directory = StaticDirectory(config.peers)
        tier = PeerTier(base, self._transport, self._loop, shared, directory, puller)
        room = RankPages(max(1, _room_bytes(config, pages) // pages.page_bytes), pages.page_bytes)
        self._lending = Lending(base, self._transport, shared, notebook, room)
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
        return NetworkTransport("node", options, open_doors("node", config.door))
    except DoorUnavailable as error:
        raise InvalidConfig("peer_door", config.door, str(error)) from error
    except ssl.SSLError as error:
        raise InvalidConfig(
            "peer_tls_cert",
            str(config.tls_cert),
            f"{error.reason}: check it, and what --peer-tls-ca and --peer-tls-key name",
        ) from error
    except OSError as error:
        raise InvalidConfig("peer_listen", str(listen), f"it cannot be bound ({error.strerror})") from error


def trust(config: PeerConfig) -> Security:
    """What this node demands of its peers. Nothing is opened for long, so an operator can be told at once.

    Raises InvalidConfig: no token or a short one, TLS files that are not all there, or an address beyond this
    machine without them."""
    if config.token is None:
        remedy = f"name a file that holds the cluster's token, or set {PEER_TOKEN_VARIABLE}"
        raise InvalidConfig("peer_token_file", None, remedy)
    try:
        security = Security(config.token, _tls_files(config))
    except ValueError as error:
        if config.token_file is None:
            raise InvalidConfig(PEER_TOKEN_VARIABLE, "(hidden)", str(error)) from error
        raise InvalidConfig("peer_token_file", str(config.token_file), str(error)) from error
    listen = () if config.listen is None else (("peer_listen", config.listen),)
    for option, address in (*listen, *(("peer", peer) for peer in config.peers)):
        try:
            security.check_host(address.host)
        except HelloRefused as error:
            flags = "--peer-tls-ca, --peer-tls-cert, --peer-tls-key"
            raise InvalidConfig(option, str(address), f"{error} ({flags})") from error
    return security


def _tls_files(config: PeerConfig) -> TlsFiles | None:
    """The TLS files, all of which can be read; None where plain TCP was chosen. Raises InvalidConfig."""
    authority, certificate, key = config.tls_authority, config.tls_cert, config.tls_key
    files = {"peer_tls_ca": authority, "peer_tls_cert": certificate, "peer_tls_key": key}
    for option, file in files.items():
        if file is not None:
            _check_readable(option, file)
    if authority and certificate and key:
        return TlsFiles(authority, certificate, key, config.tls_name)
    if any(files.values()):
        missing = next(option for option, file in files.items() if file is None)
        raise InvalidConfig(
            missing, None, "give all of --peer-tls-ca, --peer-tls-cert and --peer-tls-key, or none"
        )
    if not config.plain:
        remedy = "give certificates, or --peer-plain if all peers are on this machine"
        raise InvalidConfig("peer_tls_cert", None, remedy)
    return None


def _check_readable(option: str, file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        remedy = f"it cannot be read ({error.strerror}): give a PEM file (scripts/certificates.py makes them)"
        raise InvalidConfig(option, str(file), remedy) from error
