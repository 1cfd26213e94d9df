"""Keep what adapter names mean at this node.

Folders are read here, and peers asked, before a name means something; afterwards a name is a dictionary's key.
"""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lora.adapter import NAME_RULE, AdapterEntry, AdapterRef, RemoteName, is_name
from lora.errors import AdapterRefused, InvalidName, UnknownAdapter
from lora.format.adapter_files import Flaw
from lora.format.companions import (
    NO_COMPANIONS,
    Companions,
    CompanionsCheck,
    Vocabulary,
    read_companions,
    read_vocabulary,
)
from lora.format.packed import PackedLayout
from lora.format.peft import PackedAdapter
from lora.format.peft_config import CONFIG_FILE
from lora.memory.residency import Content
from lora.peers.manifest import Manifest
from lora.peers.published_manifests import PublishedManifests
from lora.store.loader import AdapterLoader
from lora.store.tier_chain import TierChain

_MISSES = 2  # a node that starts again needs a moment until it knows its names
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Name:
    """What a name means now; `folder` is None where a peer told it.

    `hops` is how far this node is from one that owns the name (0: it does). `misses` counts how often in a row no
    peer has confirmed it. `packing` is held by whoever reads the folder, so that it is read once.
    """

    name: str
    folder: Path | None
    ref: AdapterRef | None = None
    companions: Companions = NO_COMPANIONS
    hops: int = 0
    misses: int = 0
    packing: threading.Lock = field(default_factory=threading.Lock)


class AdapterRegistry:
    """Names and what they mean. Every method may be called from any thread.

    `_lock` guards the names and all fields of each but `packing`. Only this class takes it, for as long as a
    dictionary takes: folders are read and peers asked without it. So what a name means is checked again before it is
    changed.

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
        self._published = published
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._names: dict[str, _Name] = {}
        self._reserved: frozenset[str] = frozenset()
        self._check_companions: CompanionsCheck = lambda companions, vocabulary: None

    def check_companions(self, check: CompanionsCheck) -> None:
        """Have `check` see what lies beside an adapter's weights. To be called before any is declared."""
        self._check_companions = check

    def reserve(self, names: Iterable[str]) -> None:
        """Keep these names, which are the base model's, from adapters. To be called before any is declared."""
        self._reserved = frozenset(names)

    def check_name(self, name: str) -> None:
        """Raise InvalidName unless an adapter of this node may have the name."""
        if not is_name(name):
            raise InvalidName(name, f"choose another name: give {NAME_RULE}")
        if name in self._reserved:
            raise InvalidName(name, "the base model has that name: choose another")

    def declare(self, name: str, folder: Path) -> None:
        """Remember a name and its PEFT folder; the weights are read when first asked for.

        Raises InvalidName or another AdapterRefused.
        """
        self.check_name(name)
        try:
            is_adapter = (folder / CONFIG_FILE).is_file()
        except OSError as error:
            raise AdapterRefused(name, f"{folder} cannot be read ({error.strerror})") from error
        if not is_adapter:
            raise AdapterRefused(name, f"{folder} has no {CONFIG_FILE}: give a folder saved by PEFT")
        with self._lock:
            self._unbind(self._names.get(name))
            self._names[name] = _Name(name, folder)
        self._contents.advance()

    def load(self, name: str, folder: Path) -> AdapterRef:
        """Read, check and keep an adapter, then let `name` mean it; what the name meant before stays until unused.

        Resident on return if there are free pages. Raises InvalidName or another AdapterRefused, and then nothing
        has changed.
        """
        self.check_name(name)
        companions = self._read_companions(name, folder)
        packed = self._tiers.pack(name, folder, self._most_bytes)
        self._bind_packed(_Name(name, folder, companions=companions), packed, replaces=None)
        return packed.ref

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
        """Return what changes how the adapter is asked. Of a declared one no weights are read. Raises as `resolve`."""
        with self._lock:
            entry = self._names.get(name)
            if entry is not None and entry.ref is not None:
                return entry.companions
        if entry is not None and entry.folder is not None:
            return self._read_companions(name, entry.folder)
        self._discover(name)
        with self._lock:
            entry = self._names.get(name)
            return entry.companions if entry is not None else NO_COMPANIONS

    def unload(self, name: str) -> None:
        """Forget a name at once; its content goes when no live request uses it. Raises UnknownAdapter."""
        with self._lock:
            if name not in self._names:
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
            return tuple(AdapterEntry(name, entry.folder, entry.ref) for name, entry in self._names.items())

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
                self._bind(_remote(told), told.ref, told.layout)
            else:
                entry.misses = 0
        self._contents.advance()

    def _read(self, entry: _Name) -> None:
        """Let a declared name mean what its folder holds, unless it means something. Raises AdapterRefused."""
        with entry.packing:
            if entry.ref is None and entry.folder is not None:
                entry.companions = self._read_companions(entry.name, entry.folder)
                packed = self._tiers.pack(entry.name, entry.folder, self._most_bytes)
                self._bind_packed(entry, packed, replaces=entry)

    def _read_companions(self, name: str, folder: Path) -> Companions:
        """Read and check what lies beside the weights. Raises AdapterRefused."""
        try:
            companions = read_companions(folder)
            self._check_companions(companions, read_vocabulary(folder))
        except Flaw as flaw:
            raise AdapterRefused(name, str(flaw)) from flaw
        return companions

    def _discover(self, name: str) -> None:
        """Let `name` mean what a peer says that it means, unless it has come to mean something meanwhile."""
        told = self._tiers.look_up(name, self._most_bytes)
        if told is None:
            raise UnknownAdapter(name)
        try:
            self._check_companions(told.companions, Vocabulary())
        except Flaw as flaw:
            raise AdapterRefused(name, str(flaw)) from flaw
        with self._lock:
            if name not in self._names:
                self._bind(_remote(told), told.ref, told.layout)

    def _bind_packed(self, entry: _Name, packed: PackedAdapter, replaces: _Name | None) -> None:
        """Let the entry's name mean the packed content, unless it has come to mean something else than `replaces`."""
        with self._lock:
            current = self._names.get(entry.name)
            if replaces is not None and current is not replaces:
                return
            self._bind(entry, packed.ref, packed.layout)
        self._loader.fill(packed)
        self._tiers.trim(self._contents.retained() | {packed.ref.digest})
        self._contents.advance()

    # Called under the lock

    def _bind(self, entry: _Name, ref: AdapterRef, layout: PackedLayout) -> None:
        """Let the entry's name mean this content."""
        self._contents.bind(ref, layout, entry.name, entry.folder)
        self._unbind(self._names.get(entry.name))
        entry.ref = ref
        self._names[entry.name] = entry
        if self._published is not None:
            self._published.bind(Manifest(ref, layout, entry.hops, entry.companions))

    def _unbind(self, entry: _Name | None) -> None:
        """Let the entry's name mean nothing, and count one name fewer for the content it meant."""
        if entry is None or entry.ref is None:
            return
        digest, entry.ref = entry.ref.digest, None
        if self._published is not None:
            self._published.unbind(entry.name)
        self._contents.unbind(digest)


def _remote(told: Manifest) -> _Name:
    """Make the entry of a name that a peer told."""
    return _Name(told.ref.name, None, companions=told.companions, hops=told.hops)
