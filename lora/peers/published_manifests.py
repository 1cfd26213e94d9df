"""Publish manifests: what this node tells peers of the names it knows.

A manifest is written when it is first asked for. It goes when its name means something else, or to make room.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

from lora.adapter import AdapterRef
from lora.format.packed import PackedLayout
from lora.peers.manifest import MOST_HOPS, Manifest, layout_name, manifest_name, write_manifest
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
        # How to free each manifest's buffer, by what it is published as, the oldest first.
        self._published: OrderedDict[str, Callable[[], None]] = OrderedDict()

    def bind(self, manifest: Manifest) -> None:
        """Let the manifest's name mean this from now on."""
        with self._lock:
            self.unbind(manifest.ref.name)
            self._known[manifest.ref.name] = manifest

    def unbind(self, name: str) -> None:
        """Let a name mean nothing any more."""
        with self._lock:
            published = manifest_name(self._base, name)
            if self._known.pop(name, None) is not None and published in self._published:
                self._withdraw(published)

    def publish(self, name: str) -> bool:
        """Let peers read what `name` means; False if nothing is known of it, or it came from too far."""
        with self._lock:
            manifest = self._known.get(name)
            if manifest is None or manifest.hops >= MOST_HOPS:
                return False
            return self._write(manifest_name(self._base, name), manifest)

    def publish_layout(self, ref: AdapterRef, layout: PackedLayout) -> bool:
        """Let peers read how a content is laid out, which never changes; False if no memory is left for that."""
        with self._lock:
            return self._write(layout_name(self._base, ref.digest), Manifest(ref, layout))

    def _write(self, published: str, manifest: Manifest) -> bool:
        if published in self._published:
            return True
        text = write_manifest(manifest)
        taken = self._buffers.take(len(text))
        while taken is None and self._published:
            self._withdraw(next(iter(self._published)))
            taken = self._buffers.take(len(text))
        if taken is None:
            _log.warning("%s is not published: no memory is left for its manifest", published)
            return False
        region, give_back = taken
        region.view()[:] = text
        self._transport.memory.publish(published, [region])
        self._published[published] = give_back
        return True

    def _withdraw(self, published: str) -> None:
        give_back = self._published.pop(published)
        read = self._transport.memory.withdraw(published)
        read.add_done_callback(lambda _: give_back())
