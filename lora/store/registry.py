"""Keep what adapter names mean at this node.

Folders are read here, and peers asked, before a name means something; afterwards a name is a dictionary's key.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from lora.adapter import NAME_RULE, AdapterEntry, AdapterRef, RemoteName, is_name
from lora.errors import AdapterRefused, InvalidName, NameTaken, UnknownAdapter
from lora.format.allowed_roots import ANYWHERE, AdapterFolder, AllowedRoots
from lora.format.companions import NO_COMPANIONS, Companions
from lora.format.folder_stamp import FolderStamp
from lora.format.packed import PackedLayout
from lora.format.peft import PackedAdapter
from lora.memory.residency import Content
from lora.peers.manifest import Manifest
from lora.peers.published_manifests import PublishedManifests
from lora.store.folder_reader import FolderReader, check_is_adapter
from lora.store.loader import AdapterLoader
from lora.store.named_adapter import NamedAdapter
from lora.store.tier_chain import TierChain

_MISSES = 2  # a node that starts again needs a moment until it knows its names
_log = logging.getLogger(__name__)


class AdapterRegistry:
    """Names and what they mean. Every method may be called from any thread.

    `_lock` guards the names and what each means; what was found in a folder is its reader's. Only this class takes
    it, for as long as a dictionary takes: folders are read and peers asked without it. So what a name means is
    checked again before it is changed.

    Lock order: a name's `packing`, then `_lock`, then that of Contents, of which `bind`, `unbind` and `fail` are
    called under it, and that of PublishedManifests. Contents' `advance` follows once `_lock` is free.
    """

    def __init__(
        self, loader: AdapterLoader, tiers: TierChain, published: PublishedManifests | None, most_bytes: int
    ) -> None:
        """Know no name; no adapter may be larger than `most_bytes`."""
        self._loader = loader
        self._contents = loader.contents
        self._tiers = tiers
        self._reader = FolderReader(tiers, most_bytes)
        self._published = published
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._names: dict[str, NamedAdapter] = {}
        self._reserved: frozenset[str] = frozenset()

    def reserve(self, names: Iterable[str]) -> None:
        """Keep these names, which are the base model's, from adapters. To be called before any is declared."""
        self._reserved = frozenset(names)

    def check_name(self, name: str) -> None:
        """Raise InvalidName unless an adapter of this node may have the name."""
        if not is_name(name):
            raise InvalidName(name, f"choose another name: give {NAME_RULE}")
        if name in self._reserved:
            raise InvalidName(name, "the base model has that name: choose another")

    def declare(self, name: str, folder: Path, replaces: bool = True) -> bool:
        """Remember a name and its PEFT folder; the weights are read when first asked for.

        Return False if it does not replace what this node knows by that name. Raises InvalidName or another
        AdapterRefused.
        """
        self.check_name(name)
        check_is_adapter(name, folder)
        with self._lock:
            current = self._names.get(name)
            if current is not None and current.folder is not None and not replaces:
                return False
            self._unbind(current)
            self._names[name] = NamedAdapter(name, AdapterFolder(folder))
        self._contents.advance()
        return True

    def load(
        self, name: str, folder: Path, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        """Read, check and keep an adapter, then let `name` mean it; what the name meant before stays until unused.

        Whenever its files are read, they must lie below `roots`.

        Resident on return if there are free pages. Raises InvalidName, NameTaken for a name that it would have to
        replace and may not, or another AdapterRefused; then nothing has changed.
        """
        self.check_name(name)
        if not replaces and name in self.names():
            raise NameTaken(name)
        entry = NamedAdapter(name, AdapterFolder(folder, roots))
        packed = self._reader.read(entry, AdapterFolder(folder, roots))
        if not self._bind_packed(entry, packed, lambda current: replaces or current is None):
            raise NameTaken(name)
        return packed.ref

    def folder(self, name: str) -> Path | None:
        """Tell the folder of a name that this node owns."""
        with self._lock:
            entry = self._names.get(name)
            return entry.path if entry else None

    def follow(self, name: str, folder: Path, stamp: FolderStamp) -> None:
        """Read the folder of a name again if it was read before and has changed since.

        What the name meant stays until the new content is there, and if there is none. Raises AdapterRefused for
        what may pass.
        """
        with self._lock:
            entry = self._names.get(name)
            if entry is None or entry.folder is None or entry.path != folder or entry.ref is None:
                return
            if stamp in (entry.stamp, entry.refused):
                return
        fresh = NamedAdapter(name, entry.folder)
        try:
            packed = self._reader.read(fresh, entry.folder)
        except AdapterRefused as refusal:
            if refusal.may_pass:
                raise
            entry.refuse(stamp, refusal)
            _log.warning("adapter %s keeps its content, since what its folder holds now is refused", name)
            return
        _log.info("adapter %s is now %s, since its folder has changed", name, packed.ref.digest[:12])
        self._bind_packed(fresh, packed, lambda current: current is entry)

    def known(self, name: str) -> AdapterRef | None:
        """Return what `name` means, if that can be told without waiting."""
        with self._lock:
            entry = self._names.get(name)
            return entry.ref if entry else None

    def resolve(self, name: str) -> AdapterRef:
        """Return what `name` means; a declared adapter is read first, and peers are asked for one that is not known.

        Raises UnknownAdapter, AdapterRefused; AdapterUnreachable if not all peers could be asked.
        """
        while True:
            with self._lock:
                entry = self._names.get(name)
                if entry is not None and entry.ref is not None:
                    return entry.ref
            if entry is None or entry.folder is None:
                self._discover(name)
            else:
                self._read(entry)

    def companions(self, name: str) -> Companions:
        """Return what changes how the adapter is asked. Raises as `resolve`."""
        self.resolve(name)
        with self._lock:
            return self._names[name].companions if name in self._names else NO_COMPANIONS

    def unload(self, name: str, folder: Path | None = None) -> None:
        """Forget a name at once; its content goes when no live request uses it.

        Raises UnknownAdapter, also for a name that does not mean `folder` if one is given.
        """
        with self._lock:
            entry = self._names.get(name)
            if entry is None or folder not in (None, entry.path):
                raise UnknownAdapter(name)
            self._unbind(self._names.pop(name))
        self._contents.advance()

    def names(self) -> tuple[str, ...]:
        """List all names, in order of registration."""
        with self._lock:
            return tuple(self._names)

    def entries(self) -> tuple[AdapterEntry, ...]:
        """List all names with what they mean."""
        with self._lock:
            return tuple(named.entry() for named in self._names.values())

    def lose(self, content: Content, error: Exception) -> None:
        """Give up a content that cannot be had: its names are read, or peers asked for them, afresh.

        Both in one step, so that no name comes to mean it in between.
        """
        with self._lock:
            self._contents.fail(content, error)
            for entry in [e for e in self._names.values() if e.ref is not None and e.ref == content.ref]:
                self._unbind(entry)
                if entry.folder is None:
                    del self._names[entry.name]
        self._contents.advance()

    # For peers

    def declares(self, name: str) -> bool:
        """Tell whether `name` has a folder that was not read yet."""
        with self._lock:
            entry = self._names.get(name)
            return entry is not None and entry.ref is None and entry.folder is not None

    def read(self, name: str) -> None:
        """Read the folder of a declared name. Raises AdapterRefused."""
        with self._lock:
            entry = self._names.get(name)
        if entry is not None:
            self._read(entry)

    # From peers

    def remote_names(self) -> tuple[RemoteName, ...]:
        """List the names that peers told, and what they mean here."""
        with self._lock:
            return tuple(
                RemoteName(e.ref, e.hops)
                for e in self._names.values()
                if e.folder is None and e.ref is not None
            )

    def update(self, remote: RemoteName, told: Manifest | None) -> None:
        """Let a remote name mean what peers say now; None if no peer nearer to an owner knows it.

        Nothing happens if it has come to mean something else meanwhile. Requests keep the content that they were
        accepted with.
        """
        name = remote.ref.name
        with self._lock:
            entry = self._names.get(name)
            if entry is None or entry.folder is not None or entry.ref != remote.ref:
                return
            if told is None:
                entry.misses += 1
                if entry.misses >= _MISSES:
                    _log.info("adapter %s is forgotten: no peer has it under that name", name)
                    self._unbind(self._names.pop(name))
            elif (told.ref, told.hops, told.companions) != (entry.ref, entry.hops, entry.companions):
                _log.info("adapter %s is now %s at its owner", name, told.ref.digest[:12])
                self._bind(NamedAdapter.told(told), told.ref, told.layout)
            else:
                entry.misses = 0
        self._contents.advance()

    def _read(self, entry: NamedAdapter) -> None:
        """Let a declared name mean what its folder holds, unless it means something. Raises AdapterRefused."""
        with entry.packing:
            if entry.ref is None and entry.folder is not None:
                packed = self._reader.read(entry, entry.folder)
                self._bind_packed(entry, packed, lambda current: current is entry)

    def _discover(self, name: str) -> None:
        """Let `name` mean what a peer says that it means, unless it has come to mean something meanwhile."""
        told = self._tiers.look_up(name, self._most_bytes)
        if told is None:
            raise UnknownAdapter(name)
        with self._lock:
            if name not in self._names:
                self._bind(NamedAdapter.told(told), told.ref, told.layout)

    def _bind_packed(
        self, entry: NamedAdapter, packed: PackedAdapter, may_replace: Callable[[NamedAdapter | None], bool]
    ) -> bool:
        """Let the entry's name mean the packed content, if that may replace what the name means by now; tell so."""
        with self._lock:
            if not may_replace(self._names.get(entry.name)):
                return False
            self._bind(entry, packed.ref, packed.layout)
        self._loader.fill(packed)
        self._tiers.trim(self._contents.retained() | {packed.ref.digest})
        self._contents.advance()
        return True

    # Called under the lock

    def _bind(self, entry: NamedAdapter, ref: AdapterRef, layout: PackedLayout) -> None:
        """Let the entry's name mean this content."""
        self._contents.bind(ref, layout, entry.name, entry.folder)
        self._unbind(self._names.get(entry.name))
        entry.ref = ref
        self._names[entry.name] = entry
        if self._published is not None:
            self._published.bind(Manifest(ref, layout, entry.hops, entry.companions))

    def _unbind(self, entry: NamedAdapter | None) -> None:
        """Let the entry's name mean nothing, and count one name fewer for the content it meant."""
        if entry is None or entry.ref is None:
            return
        digest, entry.ref = entry.ref.digest, None
        if self._published is not None:
            self._published.unbind(entry.name)
        self._contents.unbind(digest)
