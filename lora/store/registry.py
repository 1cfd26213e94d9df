"""Keep what adapter names mean at this node.

Folders are read here, and peers asked, before a name means something; afterwards a name is a dictionary's key.
It shares the store's lock and leaves the moving of bytes to AdapterLoader.
"""

import logging
import threading
import time
from pathlib import Path

from lora.adapter import AdapterRef
from lora.errors import AdapterRefused, UnknownAdapter
from lora.format.packed import PackedLayout
from lora.format.peft import PackedAdapter
from lora.format.peft_config import CONFIG_FILE
from lora.memory.base import Force
from lora.memory.residency import Content
from lora.names import AdapterEntry, Name, RemoteName
from lora.peers.manifest import Manifest
from lora.peers.publisher import Publisher
from lora.store.loader import AdapterLoader
from lora.store.tier_chain import TierChain

_MISSES = 2  # a node that starts again needs a moment until it knows its names
_log = logging.getLogger(__name__)


class AdapterRegistry:
    """Names and what they mean; no adapter is larger than `most_bytes`. Safe to use from any thread."""

    def __init__(
        self,
        lock: threading.Lock,
        traffic: AdapterLoader,
        supply: TierChain,
        lending: Publisher | None,
        most_bytes: int,
    ) -> None:
        self._lock = lock
        self._traffic = traffic
        self._residency = traffic.residency
        self._supply = supply
        self._lending = lending
        self._most_bytes = most_bytes
        self._names: dict[str, Name] = {}

    def declare(self, name: str, folder: Path) -> None:
        """See AdapterStore."""
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterRefused(name, f"{folder} has no {CONFIG_FILE}: give a folder saved by PEFT")
        with self._lock:
            self._unbind(self._names.get(name))
            self._names[name] = Name(name, folder)
        self._traffic.settle()

    def load(self, name: str, folder: Path) -> AdapterRef:
        """See AdapterStore."""
        packed = self._supply.pack(name, folder, self._most_bytes)
        self._bind(Name(name, folder), packed, replaces=None)
        return packed.ref

    def known(self, name: str) -> AdapterRef | None:
        """See AdapterStore."""
        with self._lock:
            entry = self._names.get(name)
            return entry.ref if entry else None

    def resolve(self, name: str) -> AdapterRef:
        """See AdapterStore."""
        while True:
            with self._lock:
                entry = self._names.get(name)
                if entry is not None and entry.ref is not None:
                    return entry.ref
            if entry is None or entry.folder is None:
                self._discover(name)
            else:
                self._read(entry)

    def unload(self, name: str) -> None:
        """See AdapterStore."""
        with self._lock:
            if name not in self._names:
                raise UnknownAdapter(name)
            self._unbind(self._names.pop(name))
        self._traffic.settle()

    def names(self) -> tuple[str, ...]:
        """See AdapterStore."""
        with self._lock:
            return tuple(self._names)

    def entries(self) -> tuple[AdapterEntry, ...]:
        """See AdapterStore."""
        with self._lock:
            return tuple(AdapterEntry(name, entry.folder, entry.ref) for name, entry in self._names.items())

    # For peers

    def declares(self, name: str) -> bool:
        """Whether `name` has a folder that was not read yet."""
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

    def learnt(self) -> tuple[RemoteName, ...]:
        """The names that peers told, and what they mean here."""
        with self._lock:
            return tuple(
                RemoteName(e.ref, e.hops)
                for e in self._names.values()
                if e.folder is None and e.ref is not None
            )

    def follow(self, learnt: RemoteName, told: Manifest | None) -> None:
        """Let a learnt name mean what peers say now; None: nobody nearer to an owner knows it. Nothing happens if it
        has come to mean something else meanwhile. Requests keep the content that they were accepted with."""
        name = learnt.ref.name
        with self._lock:
            entry = self._names.get(name)
            if entry is None or entry.folder is not None or entry.ref != learnt.ref:
                return
            if told is None:
                entry.misses += 1
                if entry.misses >= _MISSES:
                    _log.info("adapter %s is forgotten: no peer has it under that name", name)
                    self._unbind(self._names.pop(name))
            elif (told.ref, told.hops) != (entry.ref, entry.hops):
                _log.info("adapter %s is now %s at its owner", name, told.ref.digest[:12])
                self._mean(Name(name, None, hops=told.hops), told.ref, told.layout)
            else:
                entry.misses = 0
        self._traffic.settle()

    def lost(self, content: Content) -> None:
        """The content cannot be had: its names are read or asked for afresh. Under the lock."""
        for entry in [e for e in self._names.values() if e.ref is not None and e.ref == content.ref]:
            self._unbind(entry)
            if entry.folder is None:
                del self._names[entry.name]

    def _read(self, entry: Name) -> None:
        """Let a declared name mean what its folder holds, unless it means something. Raises AdapterRefused."""
        with entry.packing:
            if entry.ref is None and entry.folder is not None:
                packed = self._supply.pack(entry.name, entry.folder, self._most_bytes)
                self._bind(entry, packed, replaces=entry)

    def _bind(self, entry: Name, packed: PackedAdapter, replaces: Name | None) -> None:
        """Let the entry's name mean the packed content, unless it has come to mean something else than `replaces`."""
        started_s = time.perf_counter()
        with self._lock:
            current = self._names.get(entry.name)
            if replaces is not None and current is not replaces:
                return
            content = self._mean(entry, packed.ref, packed.layout)
            placed = content.run is None and self._residency.reserve(content, Force.FREE_PAGES)
            keep = self._traffic.retained()
        if placed:
            self._traffic.fill(content, packed, started_s)
        self._supply.trim(keep | {packed.ref.digest})
        self._traffic.settle()

    def _discover(self, name: str) -> None:
        """Let `name` mean what a peer says that it means, unless it has come to mean something meanwhile."""
        note = self._supply.look_up(name, self._most_bytes)
        if note is None:
            raise UnknownAdapter(name)
        with self._lock:
            if name not in self._names:
                self._mean(Name(name, None, hops=note.hops), note.ref, note.layout)

    def _mean(self, entry: Name, ref: AdapterRef, layout: PackedLayout) -> Content:
        """Let the entry's name mean this content. Under the lock."""
        content = self._residency.admit(ref, layout, self._supply.reload_s(ref.nbytes))
        content.names += 1
        self._unbind(self._names.get(entry.name))
        entry.ref = ref
        self._names[entry.name] = entry
        self._supply.remember(ref.digest, layout, entry.name, entry.folder)
        if self._lending is not None:
            self._lending.bind(Manifest(ref, layout, entry.hops))
        return content

    def _unbind(self, entry: Name | None) -> None:
        """One name fewer for the content it meant. Under the lock."""
        if entry is None or entry.ref is None:
            return
        content = self._residency.find(entry.ref.digest)
        entry.ref = None
        if self._lending is not None:
            self._lending.unbind(entry.name)
        if content is not None:
            content.names -= 1
            self._traffic.doom_unwanted(content)
