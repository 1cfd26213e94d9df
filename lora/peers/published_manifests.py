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
    """The manifests of one base model's adapters. Any thread may call every method; nothing waits.

    `_lock` guards which names are known and which of them are published. Under it the transport is called, which calls
    nothing of ours, and ManifestBuffers, whose lock is taken last.
    """

    def __init__(self, base: str, transport: Transport, buffers: ManifestBuffers) -> None:
        self._base = base
        self._transport = transport
        self._buffers = buffers
        self._lock = threading.RLock()  # binding unbinds
        self._known: dict[str, Manifest] = {}  # what each name means, published or not
        # How to free each published manifest's buffer, the oldest first.
        self._published: OrderedDict[str, Callable[[], None]] = OrderedDict()

    def bind(self, manifest: Manifest) -> None:
        """Let the manifest's name mean this from now on."""
        with self._lock:
            self.unbind(manifest.ref.name)
            self._known[manifest.ref.name] = manifest

    def unbind(self, name: str) -> None:
        """Let a name mean nothing any more."""
        with self._lock:
            if self._known.pop(name, None) is not None and name in self._published:
                self._withdraw(name)

    def publish(self, name: str) -> bool:
        """Let peers read what `name` means; False if nothing is known of it, or it came from too far."""
        with self._lock:
            manifest = self._known.get(name)
            if manifest is None or manifest.hops >= MOST_HOPS:
                return False
            return name in self._published or self._write(name, write_manifest(manifest))

    def _write(self, name: str, text: bytes) -> bool:
        taken = self._buffers.take(len(text))
        while taken is None and self._published:
            self._withdraw(next(iter(self._published)))
            taken = self._buffers.take(len(text))
        if taken is None:
            _log.warning("adapter %s is not published: no memory is left for its manifest", name)
            return False
        region, give_back = taken
        region.view()[:] = text
        self._transport.memory.publish(manifest_name(self._base, name), [region])
        self._published[name] = give_back
        return True

    def _withdraw(self, name: str) -> None:
        give_back = self._published.pop(name)
        read = self._transport.memory.withdraw(manifest_name(self._base, name))
        read.add_done_callback(lambda _: give_back())
