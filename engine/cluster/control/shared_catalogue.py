"""Own what the cluster's adapter names mean: on disk first, then in memory, then told to whoever places adapters.

Runs on the event loop; the file is read and written in a thread.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from engine.catalogue.alias_targets import (
    Targets,
    check_is_no_target,
    check_may_be_target,
    check_same_prompts,
)
from engine.catalogue.base import CatalogueEntry, EntrySettings
from engine.catalogue.catalogue_file import CatalogueFile, RegisteredName
from engine.errors import UnknownModel
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterRef
from lora.format.companions import Companions
from scheduler.cluster.protocol.messages import AdapterAdded, AdapterDeleted, AdapterPinned

_WRITE_S = 30.0
_ONE = 1  # SQLite's connection belongs to one thread at a time

PlaceAnew = Callable[[AdapterAdded | AdapterDeleted | AdapterPinned], None]
MayReplace = Callable[[RegisteredName | None], bool]


class SharedCatalogue:
    """The names. A change that has returned is on disk, and is in `names` in the order in which it was written."""

    def __init__(self, file: CatalogueFile, place: PlaceAnew) -> None:
        """Own `file`; `place` hears of contents that come to have a name, lose their last, or are pinned otherwise."""
        self._file, self._place = file, place
        self._pool = TaskPool("catalogue", _ONE, _WRITE_S)
        self._writing = asyncio.Lock()
        self._names: dict[str, RegisteredName] = {}
        self._pins: dict[AdapterRef, dict[str, int]] = {}  # of each content, by the names that mean it
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
        """Let a name mean this, if that may replace what it means by then; tell so. What was asked for it stays.

        Raises NotInTime, NotWritten, Superseded.
        """
        name = registered.entry.name
        async with self._writing:
            known = self._names.get(name)
            if not may_replace(known):
                return False
            if known is not None:
                asked = {"pinned": known.entry.pinned, "max_requests": known.entry.max_requests}
                registered = RegisteredName(replace(registered.entry, **asked), registered.owner)
            await self._pool.run(lambda: self._file.put(registered))
            self._set(name, registered)
        return True

    def targets(self) -> dict[str, Targets]:
        """Return the targets of each alias that has shares."""
        return {name: entry.targets for name, entry in self.entries.items() if entry.targets}

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> CatalogueEntry:
        """Let `name` mean what `target` means now, and its requests be answered by `targets`, if there are any.

        Raises UnknownModel for a target that means nothing, InvalidAdapterName for one that cannot have a share.
        """
        async with self._writing:
            if targets:
                self._check(name, targets)
            meant = self._names.get(target)
            if meant is None:
                raise UnknownModel(target)
            await self._pool.run(lambda: self._file.set_alias(name, target, targets))
            known = self._names.get(name)
            pinned, most = (known.entry.pinned, known.entry.max_requests) if known is not None else (0, 0)
            asked = {"pinned": pinned, "max_requests": most, "targets": targets}
            alias = replace(meant.entry, name=name, alias_of=target, **asked)
            self._set(name, RegisteredName(alias))
        return alias

    async def set(self, name: str, settings: EntrySettings) -> CatalogueEntry:
        """Ask something else for a name. Raises UnknownModel."""
        async with self._writing:
            known = self._names.get(name)
            if known is None:
                raise UnknownModel(name)
            given = {"pinned": settings.pinned, "max_requests": settings.max_requests}
            asked = {field: value for field, value in given.items() if value is not None}
            registered = RegisteredName(replace(known.entry, **asked), known.owner)
            await self._pool.run(lambda: self._file.put(registered))
            self._set(name, registered)
        return registered.entry

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

    def _check(self, name: str, targets: Targets) -> None:
        """Raise UnknownModel or InvalidAdapterName for targets that `name` cannot lead to by share."""
        check_is_no_target(name, self.targets())
        companions: dict[str, Companions] = {}
        for each in targets:
            known = self._names.get(each.name)
            if known is None:
                raise UnknownModel(each.name)
            check_may_be_target(name, each.name, known.entry.targets)
            companions[each.name] = known.entry.companions
        check_same_prompts(name, companions)

    def _set(self, name: str, registered: RegisteredName | None) -> None:
        before = self._names.pop(name, None)
        self._entries = None
        if registered is not None:
            self._names[name] = registered
            self._count(registered.entry.ref, name, registered.entry.pinned)
        if before is not None and (registered is None or registered.entry.ref != before.entry.ref):
            self._count(before.entry.ref, name, None)

    def _count(self, ref: AdapterRef, name: str, pinned: int | None) -> None:
        """Note that a name means a content with so many copies pinned, or means it no more; tell what follows."""
        pins = self._pins.setdefault(ref, {})
        fresh, former = not pins, max(pins.values(), default=0)
        pins.pop(name, None)
        if pinned is not None:
            pins[name] = pinned
        if not pins:
            del self._pins[ref]
            self._place(AdapterDeleted(ref))
            return
        if fresh:
            self._place(AdapterAdded(ref))
        if (copies := max(pins.values())) != former:
            self._place(AdapterPinned(ref, copies))
