"""Tell what adapter names mean at a node, and change it when the coordinator asks.

These are names that the node's own options declare, and those that it was asked to load.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from engine.catalogue.base import CatalogueEntry
from engine.errors import InvalidAdapter, UnknownModel, adapter_errors
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterEntry, AdapterRef
from lora.format.companions import Companions
from lora.sources.source_url import AdapterSource, InvalidSource, source_of

_THREADS = 4
_MOST_WAIT_S = 290.0  # less than the coordinator waits


class ReadNames(Protocol):
    """The part of AdapterRegistry that is asked. All may block but `entries`."""

    def entries(self) -> tuple[AdapterEntry, ...]:
        """List all names with what they mean."""
        ...

    def resolve(self, name: str) -> AdapterRef:
        """Return what a name means, reading its folder first if need be."""
        ...

    def companions(self, name: str) -> Companions:
        """Return what changes how the adapter is asked."""
        ...


LoadFolder = Callable[[str, AdapterSource, bool], Awaitable[AdapterRef]]
"""Load a URL, or a PEFT folder from below the server's allowed roots under a name; it may replace what that means."""


class NodeNames:
    """The names of one node. Used on one event loop."""

    def __init__(
        self, registry: ReadNames, load: LoadFolder, unload: Callable[[str], Awaitable[None]]
    ) -> None:
        """Ask `registry`; `load` and `unload` change it as clients of a single server do."""
        self._registry, self._load, self._unload = registry, load, unload
        self._pool = TaskPool("adapter names", _THREADS, _MOST_WAIT_S)

    def declared(self) -> Mapping[str, str]:
        """Return the names that have a folder here, with digests, "" where none was read."""
        found = (entry for entry in self._registry.entries() if entry.folder is not None)
        return {entry.name: entry.ref.digest if entry.ref is not None else "" for entry in found}

    async def resolve(self, name: str) -> CatalogueEntry:
        """Return what a declared name means. Raises UnknownModel, InvalidAdapter, AdapterFailed or NotInTime."""
        with adapter_errors(name):
            return await self._pool.run(lambda: self._entry(name))

    async def load(self, name: str, folder: str, replaces: bool) -> CatalogueEntry:
        """Load a folder or a URL under a name. Raises InvalidAdapterName, AdapterExists, and as `resolve`."""
        try:
            source = source_of(folder)
        except InvalidSource as error:
            raise InvalidAdapter(str(error)) from error
        await self._load(name, source, replaces)
        return await self.resolve(name)

    async def unload(self, name: str) -> None:
        """Forget a name; nothing happens if it is not there."""
        try:
            await self._unload(name)
        except UnknownModel:
            return

    def close(self) -> None:
        """Read nothing more."""
        self._pool.close()

    def _entry(self, name: str) -> CatalogueEntry:
        ref, companions = self._registry.resolve(name), self._registry.companions(name)
        told = next((entry for entry in self._registry.entries() if entry.name == name), None)
        root = told.source if told is not None else ""
        return CatalogueEntry(name, ref, root, companions, told.effect if told is not None else None)
