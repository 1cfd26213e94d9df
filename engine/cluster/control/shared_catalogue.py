"""Own what the cluster's adapter names mean: on disk first, then in memory, then told to whoever places adapters.

Runs on the event loop; the file is read and written in a thread.
"""

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.cluster.control.catalogue_file import CatalogueFile, RegisteredName
from engine.cluster.view import CatalogueEntry
from engine.errors import UnknownModel
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterRef
from scheduler.cluster.protocol.messages import AdapterAdded, AdapterDeleted

_WRITE_S = 30.0
_ONE = 1  # SQLite's connection belongs to one thread at a time

PlaceAnew = Callable[[AdapterAdded | AdapterDeleted], None]
MayReplace = Callable[[RegisteredName | None], bool]


class SharedCatalogue:
    """The names. A change that has returned is on disk, and is in `names` in the order in which it was written."""

    def __init__(self, file: CatalogueFile, place: PlaceAnew) -> None:
        """Own `file`; `place` hears of each content that comes to have a name, and of each that loses its last."""
        self._file, self._place = file, place
        self._pool = TaskPool("catalogue", _ONE, _WRITE_S)
        self._writing = asyncio.Lock()
        self._names: dict[str, RegisteredName] = {}
        self._uses: dict[AdapterRef, int] = {}
        self._entries: Mapping[str, CatalogueEntry] | None = None

    @property
    def epoch(self) -> int:
        """Return the epoch in which this coordinator leads."""
        return self._file.epoch

    @property
    def names(self) -> Mapping[str, RegisteredName]:
        """Return what each name means, and who owns it."""
        return MappingProxyType(self._names)

    @property
    def entries(self) -> Mapping[str, CatalogueEntry]:
        """Return what each name means, as a value of its own: the same one until something changes."""
        if self._entries is None:
            self._entries = {name: each.entry for name, each in self._names.items()}
        return self._entries

    async def open(self) -> None:
        """Read the file. Raises InvalidConfig."""
        for name, registered in (await self._pool.run(self._file.read)).items():
            self._set(name, registered)

    async def put(self, registered: RegisteredName, may_replace: MayReplace = lambda _: True) -> bool:
        """Let a name mean this, if that may replace what it means by then; tell so. Raises NotInTime, Superseded."""
        name = registered.entry.name
        async with self._writing:
            if not may_replace(self._names.get(name)):
                return False
            await self._pool.run(lambda: self._file.put(registered))
            self._set(name, registered)
        return True

    async def set_alias(self, name: str, target: str) -> CatalogueEntry:
        """Let `name` mean what `target` means now. Raises UnknownModel for a target that means nothing."""
        async with self._writing:
            meant = self._names.get(target)
            if meant is None:
                raise UnknownModel(target)
            await self._pool.run(lambda: self._file.set_alias(name, target))
            entry = meant.entry
            alias = CatalogueEntry(name, entry.ref, entry.root, entry.companions, entry.effect, entry.pinned)
            self._set(name, RegisteredName(alias))
        return alias

    async def remove(self, name: str) -> None:
        """Let a name mean nothing. Raises UnknownModel, NotInTime, Superseded."""
        async with self._writing:
            if name not in self._names:
                raise UnknownModel(name)
            await self._pool.run(lambda: self._file.remove(name))
            self._set(name, None)

    async def check_leads(self) -> None:
        """Raise Superseded if another coordinator has begun with the same file."""
        await self._pool.run(self._file.check_leads)

    async def close(self) -> None:
        """Close the file after the write that is under way."""
        async with self._writing:
            await self._pool.run_or_leave("the catalogue", self._file.close)
        self._pool.close()

    def _set(self, name: str, registered: RegisteredName | None) -> None:
        before = self._names.pop(name, None)
        self._entries = None
        if registered is not None:
            self._names[name] = registered
            ref = registered.entry.ref
            uses = self._uses[ref] = self._uses.get(ref, 0) + 1
            if uses == 1:
                self._place(AdapterAdded(ref))
        if before is not None:
            ref = before.entry.ref
            self._uses[ref] -= 1
            if not self._uses[ref]:
                del self._uses[ref]
                self._place(AdapterDeleted(ref))
