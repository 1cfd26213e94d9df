"""Publish manifests: what this node tells peers of the names it knows.

A manifest is written when it is first asked for. It goes when its name means something else, or to make room.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

from lora.peers.manifest import MOST_HOPS, Manifest, manifest_name, write_manifest
from lora.peers.regions import ManifestBuffers
from transport.base import Transport

_log = logging.getLogger(__name__)


class PublishedManifests:
    """The notes of one base model's adapters. Safe to use from any thread; nothing waits."""

    def __init__(self, base: str, transport: Transport, notebook: ManifestBuffers) -> None:
        self._base = base
        self._transport = transport
        self._notebook = notebook
        self._lock = threading.RLock()  # binding unbinds
        self._known: dict[str, Manifest] = {}  # what each name means, lent or not
        # How to free each note, the oldest first.
        self._lent: OrderedDict[str, Callable[[], None]] = OrderedDict()

    def bind(self, note: Manifest) -> None:
        """The note's name means this from now on."""
        with self._lock:
            self.unbind(note.ref.name)
            self._known[note.ref.name] = note

    def unbind(self, name: str) -> None:
        """`name` means nothing any more."""
        with self._lock:
            if self._known.pop(name, None) is not None and name in self._lent:
                self._withdraw(name)

    def lend(self, name: str) -> bool:
        """Let peers read what `name` means; False if nothing is known of it, or it is hearsay from too far."""
        with self._lock:
            note = self._known.get(name)
            if note is None or note.hops >= MOST_HOPS:
                return False
            return name in self._lent or self._write(name, write_manifest(note))

    def _write(self, name: str, written: bytes) -> bool:
        place = self._notebook.take(len(written))
        while place is None and self._lent:
            self._withdraw(next(iter(self._lent)))
            place = self._notebook.take(len(written))
        if place is None:
            _log.warning("adapter %s is not lent: no memory is left for its note", name)
            return False
        region, give_back = place
        region.view()[:] = written
        self._transport.memory.publish(manifest_name(self._base, name), [region])
        self._lent[name] = give_back
        return True

    def _withdraw(self, name: str) -> None:
        give_back = self._lent.pop(name)
        read = self._transport.memory.withdraw(manifest_name(self._base, name))
        read.add_done_callback(lambda _: give_back())
