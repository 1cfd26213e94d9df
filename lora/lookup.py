"""Lookup: what a name means that this node does not know. Coroutines, for the transport's event loop only.

Who asks may be hostile: only well-formed names are asked for, few at a time, once per name however many want it,
and a name that nobody knows is not asked for again for a while.
"""

import asyncio
import logging
import time
from collections import OrderedDict

from lora.directory import Directory
from lora.errors import AdapterUnreachable, UnknownAdapter
from lora.flat import InvalidHeader
from lora.names import is_name
from lora.note import Note, note_name, read_note
from lora.puller import Puller
from transport.base import Address
from transport.errors import NotOffered, TransportError

_NAMES_AT_ONCE = 4
_ABSENT_S = 5.0
_MOST_ABSENT = 4096
_log = logging.getLogger(__name__)


class Lookup:
    """Asks all peers of one base model at once and believes the first that knows."""

    def __init__(self, base: str, puller: Puller, directory: Directory, absent_s: float = _ABSENT_S) -> None:
        self._base = base
        self._puller = puller
        self._directory = directory
        self._absent_s = absent_s
        self._seats = asyncio.Semaphore(_NAMES_AT_ONCE)
        self._asking: dict[str, asyncio.Task[Note]] = {}
        self._absent_until_s: OrderedDict[str, float] = OrderedDict()

    async def find(self, name: str) -> Note:
        """What `name` means. UnknownAdapter if no peer knows it, AdapterUnreachable if one could not be asked."""
        if not is_name(name) or time.monotonic() < self._absent_until_s.get(name, 0.0):
            raise UnknownAdapter(name)
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(self._ask(name))
            asking.add_done_callback(lambda _: self._asking.pop(name))
        return await asyncio.shield(asking)

    async def _ask(self, name: str) -> Note:
        peers = self._directory.peers()
        async with self._seats:
            questions = [asyncio.create_task(self._ask_peer(peer, name)) for peer in peers]
            silent = 0
            try:
                for answer in asyncio.as_completed(questions):
                    try:
                        note = await answer
                    except (TransportError, InvalidHeader):
                        silent += 1
                    else:
                        if note is not None:
                            return note
            finally:
                for question in questions:
                    question.cancel()
                await asyncio.gather(*questions, return_exceptions=True)
        if silent:
            raise AdapterUnreachable(name, silent, len(peers))
        self._remember_absent(name)
        raise UnknownAdapter(name)

    async def _ask_peer(self, peer: Address, name: str) -> Note | None:
        try:
            return read_note(name, await self._puller.read(peer, note_name(self._base, name)))
        except NotOffered:
            return None
        except InvalidHeader as error:
            _log.warning("peer %s: %s", peer, error)
            raise

    def _remember_absent(self, name: str) -> None:
        self._absent_until_s[name] = time.monotonic() + self._absent_s
        if len(self._absent_until_s) > _MOST_ABSENT:
            self._absent_until_s.popitem(last=False)
