"""Hold what adapter names mean, under one lock, for those that change it: the registry, and the names from peers."""

import threading

from lora.adapter import AdapterEntry, AdapterRef
from lora.format.packed import PackedLayout
from lora.peers.manifest import Manifest
from lora.peers.published_manifests import PublishedManifests
from lora.store.contents import Contents
from lora.store.names.named_adapter import NamedAdapter


class NameTable:
    """Names and what each means; what was found in a folder is its reader's.

    `lock` guards `by_name`. Only AdapterRegistry and RemoteNames take it, for as long as a dictionary takes: folders
    are read and peers asked without it. So what a name means is checked again before it is changed.

    Lock order: a name's `packing`, then `lock`, then that of Contents, of which `bind`, `unbind` and `fail` are called
    under it, and that of PublishedManifests. Contents' `advance` follows once `lock` is free.
    """

    def __init__(self, contents: Contents, published: PublishedManifests | None) -> None:
        """Know no name; `published` tells peers what names mean."""
        self.lock = threading.Lock()
        self.by_name: dict[str, NamedAdapter] = {}
        self._contents = contents
        self._published = published

    def names(self) -> tuple[str, ...]:
        """List all names, in order of registration."""
        with self.lock:
            return tuple(self.by_name)

    def entries(self) -> tuple[AdapterEntry, ...]:
        """List all names with what they mean."""
        with self.lock:
            return tuple(named.entry() for named in self.by_name.values())

    # Called under the lock

    def bind(self, entry: NamedAdapter, ref: AdapterRef, layout: PackedLayout) -> None:
        """Let the entry's name mean this content."""
        self._contents.bind(ref, layout, entry.name, entry.folder)
        self.unbind(self.by_name.get(entry.name))
        entry.ref = ref
        self.by_name[entry.name] = entry
        if self._published is not None:
            self._published.bind(Manifest(ref, layout, entry.hops, entry.companions))

    def unbind(self, entry: NamedAdapter | None) -> None:
        """Let the entry's name mean nothing, and count one name fewer for the content it meant."""
        if entry is None or entry.ref is None:
            return
        digest, entry.ref = entry.ref.digest, None
        entry.tried, entry.effect = False, None
        if self._published is not None:
            self._published.unbind(entry.name)
        self._contents.unbind(digest)

    def lose(self, entry: NamedAdapter) -> None:
        """Let the entry's name mean nothing; it stays known if this node has its folder."""
        self.unbind(entry)
        if entry.folder is None and self.by_name.get(entry.name) is entry:
            del self.by_name[entry.name]
