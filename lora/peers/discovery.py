"""NameDiscovery: what peers say that a name means. Coroutines, for the transport's event loop only.

Who asks may be hostile: only well-formed names are asked for, few at a time, once per name however many want it,
and a name that nobody knows is not asked for again for a while.

Names are hearsay that can go in circles, so distances keep it honest, as in RIP (RFC 2453): a learnt name is one hop
farther than the nearest who tells it, stands only while somebody nearer to an owner tells it, and is told no farther
than MOST_HOPS. Hence a name that its owners have dropped dies out wherever it was learnt.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from lora.errors import AdapterUnreachable, UnknownAdapter
from lora.format.packed import InvalidHeader
from lora.names import RemoteName, is_name
from lora.peers.directory import Directory
from lora.peers.manifest import Manifest, manifest_name, read_manifest
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
        self._seats = asyncio.Semaphore(_NAMES_AT_ONCE)
        self._asking: dict[str, asyncio.Task[Manifest]] = {}
        self._absent_until_s: OrderedDict[str, float] = OrderedDict()

    async def find(self, name: str) -> Manifest:
        """What `name` means. UnknownAdapter if no peer knows it, AdapterUnreachable if one could not be asked."""
        if not is_name(name) or time.monotonic() < self._absent_until_s.get(name, 0.0):
            raise UnknownAdapter(name)
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(self._discover(name))
            asking.add_done_callback(lambda _: self._asking.pop(name))
        return await asyncio.shield(asking)

    async def confirm(self, learnt: RemoteName) -> Manifest:
        """What a learnt name means now to those nearer to an owner: the same content if one of them stands by it.

        UnknownAdapter if none of them knows it, AdapterUnreachable if one could not be asked.
        """
        name, digest = learnt.ref.name, learnt.ref.digest
        notes = await self._ask(name, lambda note: note.hops < learnt.hops and note.ref.digest == digest)
        nearer = [note for note in notes if note.hops < learnt.hops]
        if not nearer:
            raise UnknownAdapter(name)
        same = [note for note in nearer if note.ref.digest == digest]
        return min(same or nearer, key=_distance).passed_on()

    async def _discover(self, name: str) -> Manifest:
        try:
            notes = await self._ask(name, lambda note: note.hops == 0)
        except UnknownAdapter:
            self._remember_absent(name)
            raise
        return min(notes, key=_distance).passed_on()

    async def _ask(self, name: str, enough: Callable[[Manifest], bool]) -> list[Manifest]:
        """What peers say, until one said what is `enough`.

        UnknownAdapter if no peer knows the name, AdapterUnreachable if none of those that could be asked does.
        """
        peers = self._directory.peers()
        notes: list[Manifest] = []
        silent = 0
        async with self._seats:
            questions = [asyncio.create_task(self._ask_peer(peer, name)) for peer in peers]
            try:
                for answer in asyncio.as_completed(questions):
                    try:
                        note = await answer
                    except (TransportError, InvalidHeader):
                        silent += 1
                        continue
                    notes += [note] if note is not None else []
                    if note is not None and enough(note):
                        return notes
            finally:
                for question in questions:
                    question.cancel()
                await asyncio.gather(*questions, return_exceptions=True)
        if notes:
            return notes
        if silent:
            raise AdapterUnreachable(name, silent, len(peers))
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


def _distance(note: Manifest) -> tuple[int, str]:
    """The nearest to an owner first, and always the same of several."""
    return note.hops, note.ref.digest
