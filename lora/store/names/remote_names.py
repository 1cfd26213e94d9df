"""Let names mean what peers say that they mean, until this node has a meaning of its own for them."""

import logging

from lora.adapter import AdapterRef, RemoteName
from lora.errors import UnknownAdapter
from lora.format.packed import PackedLayout
from lora.peers.manifest import Manifest
from lora.store.contents import Contents
from lora.store.names.name_table import NameTable
from lora.store.names.named_adapter import NamedAdapter
from lora.store.tier_chain import TierChain

_MISSES = 2  # a node that starts again needs a moment until it knows its names
_log = logging.getLogger(__name__)


class RemoteNames:
    """The names of a table that peers told. Every method may be called from any thread."""

    def __init__(self, table: NameTable, contents: Contents, tiers: TierChain, most_bytes: int) -> None:
        """Take no adapter larger than `most_bytes`."""
        self._table = table
        self._contents = contents
        self._tiers = tiers
        self._most_bytes = most_bytes

    def names(self) -> tuple[RemoteName, ...]:
        """List the names that peers told, and what they mean here."""
        with self._table.lock:
            entries = self._table.by_name.values()
            return tuple(RemoteName(e.ref, e.hops) for e in entries if e.folder is None and e.ref is not None)

    def discover(self, name: str) -> None:
        """Let `name` mean what a peer says that it means, unless it has come to mean something meanwhile.

        Raises UnknownAdapter, AdapterRefused; AdapterUnreachable if not all peers could be asked.
        """
        told = self._tiers.look_up(name, self._most_bytes)
        if told is None:
            raise UnknownAdapter(name)
        with self._table.lock:
            if name not in self._table.by_name:
                self._table.bind(NamedAdapter.told(told), told.ref, told.layout)

    def layout_of(self, ref: AdapterRef) -> PackedLayout:
        """Ask peers how a content is laid out, whatever its name means by now. Raises as `discover`."""
        return self._tiers.look_up_content(ref, self._most_bytes).layout

    def update(self, remote: RemoteName, told: Manifest | None) -> None:
        """Let a remote name mean what peers say now; None if no peer nearer to an owner knows it.

        Nothing happens if it has come to mean something else meanwhile. Requests keep the content that they were
        accepted with.
        """
        name, table = remote.ref.name, self._table
        with table.lock:
            entry = table.by_name.get(name)
            if entry is None or entry.folder is not None or entry.ref != remote.ref:
                return
            if told is None:
                entry.misses += 1
                if entry.misses >= _MISSES:
                    _log.info("adapter %s is forgotten: no peer has it under that name", name)
                    table.lose(entry)
            elif (told.ref, told.hops, told.companions) != (entry.ref, entry.hops, entry.companions):
                _log.info("adapter %s is now %s at its owner", name, told.ref.digest[:12])
                table.bind(NamedAdapter.told(told), told.ref, told.layout)
            else:
                entry.misses = 0
        self._contents.advance()
