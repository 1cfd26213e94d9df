"""Ask peers what a name means. Coroutines, for the transport's event loop only.

Who asks may be hostile. Only well-formed names are asked for, few at a time, and once per name however many want it.
A name that nobody knows is not asked for again for a while.

What peers tell each other could go in circles, so that distances bound it, as in RIP (RFC 2453). A remote name is one
hop farther than the nearest who tells it. It stands only while somebody nearer to an owner tells it, and is told no
farther than MOST_HOPS. Hence a name that its owners have dropped dies out wherever it was remote.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from lora.adapter import AdapterRef, RemoteName, is_name
from lora.errors import AdapterUnreachable, UnknownAdapter
from lora.format.packed import InvalidHeader
from lora.peers.directory import Directory
from lora.peers.manifest import Manifest, layout_name, manifest_name, read_manifest
from lora.peers.puller import Puller
from transport.base import Address
from transport.errors import NotOffered, TransportError

_NAMES_AT_ONCE = 4
_ABSENT_S = 5.0
_MOST_ABSENT = 4096
_log = logging.getLogger(__name__)


class NameDiscovery:
    """Asks all peers of one base model at once, and believes the one nearest to an owner."""

    def __init__(self, base: str, puller: Puller, directory: Directory, absent_s: float = _ABSENT_S) -> None:
        self._base = base
        self._puller = puller
        self._directory = directory
        self._absent_s = absent_s
        self._asks = asyncio.Semaphore(_NAMES_AT_ONCE)
        self._asking: dict[str, asyncio.Task[Manifest]] = {}
        self._absent_until_s: OrderedDict[str, float] = OrderedDict()

    async def find(self, name: str) -> Manifest:
        """Ask what `name` means. UnknownAdapter if no peer knows it, AdapterUnreachable if one could not be asked."""
        if not is_name(name) or time.monotonic() < self._absent_until_s.get(name, 0.0):
            raise UnknownAdapter(name)
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(self._discover(name))
            asking.add_done_callback(lambda _: self._asking.pop(name))
        return await asyncio.shield(asking)

    async def confirm(self, remote: RemoteName) -> Manifest:
        """Ask those nearer to an owner what a name means now: the same content if one of them confirms it.

        UnknownAdapter if none of them knows it, AdapterUnreachable if one could not be asked.
        """
        name, digest = remote.ref.name, remote.ref.digest
        manifests = await self._ask(name, lambda told: told.hops < remote.hops and told.ref.digest == digest)
        nearer = [told for told in manifests if told.hops < remote.hops]
        if not nearer:
            raise UnknownAdapter(name)
        same = [told for told in nearer if told.ref.digest == digest]
        return min(same or nearer, key=_distance).one_hop_farther()

    async def find_content(self, ref: AdapterRef) -> Manifest:
        """Ask one holder after another how a content is laid out, whatever it is called there.

        UnknownAdapter if no peer has it, AdapterUnreachable if one could not be asked.
        """
        holders, unanswered = self._directory.holders(ref.digest), 0
        for peer in holders:
            try:
                content = await self._puller.read(peer, layout_name(self._base, ref.digest))
                told = read_manifest(ref.name, content)
            except NotOffered:
                continue
            except (TransportError, InvalidHeader) as error:
                _log.warning("peer %s: %s", peer, error)
                unanswered += 1
                continue
            if told.ref.digest == ref.digest:
                return told
        if unanswered:
            raise AdapterUnreachable(ref.name, unanswered, len(holders))
        raise UnknownAdapter(ref.name)

    async def _discover(self, name: str) -> Manifest:
        try:
            manifests = await self._ask(name, lambda told: told.hops == 0)
        except UnknownAdapter:
            self._remember_absent(name)
            raise
        return min(manifests, key=_distance).one_hop_farther()

    async def _ask(self, name: str, enough: Callable[[Manifest], bool]) -> list[Manifest]:
        """Ask all peers, until one told what is `enough`.

        UnknownAdapter if no peer knows the name, AdapterUnreachable if none of those that could be asked does.
        """
        peers = self._directory.peers()
        manifests: list[Manifest] = []
        unanswered = 0
        async with self._asks:
            asks = [asyncio.create_task(self._ask_peer(peer, name)) for peer in peers]
            try:
                for answer in asyncio.as_completed(asks):
                    try:
                        told = await answer
                    except (TransportError, InvalidHeader):
                        unanswered += 1
                        continue
                    manifests += [told] if told is not None else []
                    if told is not None and enough(told):
                        return manifests
            finally:
                for ask in asks:
                    ask.cancel()
                await asyncio.gather(*asks, return_exceptions=True)
        if manifests:
            return manifests
        if unanswered:
            raise AdapterUnreachable(name, unanswered, len(peers))
        raise UnknownAdapter(name)

    async def _ask_peer(self, peer: Address, name: str) -> Manifest | None:
        try:
            return read_manifest(name, await self._puller.read(peer, manifest_name(self._base, name)))
        except NotOffered:
            return None
        except InvalidHeader as error:
            _log.warning("peer %s: %s", peer, error)
            raise

    def _remember_absent(self, name: str) -> None:
        self._absent_until_s[name] = time.monotonic() + self._absent_s
        if len(self._absent_until_s) > _MOST_ABSENT:
            self._absent_until_s.popitem(last=False)


def _distance(manifest: Manifest) -> tuple[int, str]:
    """Order the nearest to an owner first, and always the same of several."""
    return manifest.hops, manifest.ref.digest
