"""Own the registry of adapters of a single server: names in its store, and in a file if the server has one.

What clients load, alias, pin or limit is in the file before they are answered, and is so again when the server starts
anew. Names that its options give win over the file. A folder is read again then: a name means what it holds by that
time. Used on one event loop; files are waited for in threads.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from engine.catalogue.adapter_places import AdapterPlaces
from engine.catalogue.alias_targets import Alias, Targets
from engine.catalogue.base import (
    AdapterRecord,
    CatalogueEntry,
    ClusterRecord,
    EntrySettings,
    NodeRecord,
    names_after,
)
from engine.catalogue.catalogue_file import CatalogueFile, NotWritten, RegisteredName, Superseded
from engine.catalogue.local_aliases import LocalAliases
from engine.catalogue.pinned_names import PinnedNames
from engine.errors import AdapterFailed, AskRouter, EngineError, UnknownModel
from engine.live.live_outputs import LiveOutputs
from engine.metrics.series import MetricSeries
from engine.waiting.adapter_names import AdapterNames
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterEntry, AdapterRef
from lora.errors import AdapterRefused
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.sources.source_url import AdapterSource, InvalidSource, is_url, source_of, source_text
from lora.store.store import AdapterStore
from scheduler.request import InvalidParameter

R = TypeVar("R")
_WRITE_S, _ONE = 30.0, 1
NODE = "single"
_OPTIONS = "options"  # owner of a name that clients have only pinned or limited
_log = logging.getLogger(__name__)


class LocalCatalogue:
    """AdapterCatalogue of one server's store; `load` and `unload` change its names as well."""

    def __init__(
        self,
        store: AdapterStore,
        names: AdapterNames,
        outputs: LiveOutputs,
        file: CatalogueFile | None = None,
        roots: AllowedRoots = ANYWHERE,
    ) -> None:
        """Know what the store knows; `start` takes up what `file` has, from below `roots`."""
        self._names, self._file, self._roots = names, file, roots
        self._outputs, self._uses = outputs, outputs.uses
        self._registry, self._places = store.registry, AdapterPlaces(store)
        self._pinned = PinnedNames(store.kept, names)
        self._settings: dict[str, EntrySettings] = {}
        self._registered: set[str] = set()  # what clients have loaded or aliased
        self._missing: dict[str, AdapterEntry] = {}  # the file's names whose folders cannot be read now
        self._pool = TaskPool("catalogue", _ONE, _WRITE_S)
        self.aliases = LocalAliases(names, store.registry, self._pool)
        self._changing = asyncio.Lock()
        self._node, self._is_owner = NODE, True

    def hand_over(self, node: str) -> None:
        """Leave aliases, pins and limits to the coordinator of the cluster that this server is a node of."""
        self._node, self._is_owner = node, False

    async def start(self) -> None:
        """Take up the file's names. Raises InvalidConfig for one that is damaged."""
        if self._file is None:
            return
        rows = (await self._pool.run(self._file.read)).values()
        for row in sorted(
            rows, key=lambda row: bool(row.entry.alias_of)
        ):  # aliases come after what they mean
            entry = row.entry
            if row.owner != _OPTIONS:
                await self._pool.run(lambda entry=entry: self._declare(entry))
                self._registered.add(entry.name)
            elif self._registry.folder(entry.name) is None:
                continue  # the options give it no more
            if entry.alias_of:
                self.aliases.take(entry.name, Alias(entry.alias_of, entry.targets))
            self._remember(entry.name, EntrySettings(entry.pinned, entry.max_requests))

    async def close(self) -> None:
        """Keep nothing more."""
        await self._pinned.close()
        if self._file is not None:
            await self._pool.run_or_leave("the catalogue", self._file.close)
        self._pool.close()

    def max_requests(self, name: str) -> int:
        """Return how many requests may be under way by a name; 0 means any number."""
        settings = self._settings.get(name)
        return (settings.max_requests or 0) if settings is not None else 0

    async def load(self, name: str, folder: AdapterSource, replaces: bool, roots: AllowedRoots) -> AdapterRef:
        """Load an adapter under a name, and keep that. Raises as AdapterNames.load, or AdapterFailed."""
        ref = await self._names.load(name, folder, replaces, roots)
        async with self._changing:
            self.aliases.forget(name)
            self._missing.pop(name, None)
            self._registered.add(name)
            await self._write(name, ref, source_text(folder))
        return ref

    async def unload(self, name: str) -> None:
        """Forget a name, also in the file. Raises UnknownModel, AdapterFailed."""
        async with self._changing:
            self.aliases.check_is_no_target(name)
            if self._missing.pop(name, None) is None:
                self._names.unload(name)
            self.aliases.forget(name)
            self._settings.pop(name, None)
            self._registered.discard(name)
            self._pinned.unpin(name)
            if self._file is not None:
                file = self._file
                await self._kept(lambda: file.remove(name))

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> None:
        """Let `name` mean what `target` means now. As AdapterCatalogue.set_alias."""
        self._check_owner()
        async with self._changing:
            entry = await self.aliases.set(name, target, targets)
            self._missing.pop(name, None)
            self._registered.add(name)
            if entry.ref is not None:
                await self._write(name, entry.ref, entry.source)

    async def set(self, name: str, settings: EntrySettings) -> None:
        """Ask something else for a name. As AdapterCatalogue.set."""
        self._check_owner()
        if settings.pinned is not None and settings.pinned > 1:
            raise InvalidParameter("copies", settings.pinned, "a single server has one copy: give 1")
        async with self._changing:
            ref = await self._names.resolve(name)
            if ref.is_base:
                raise UnknownModel(name)
            self._remember(name, settings)
            entry = self._entries().get(name)
            await self._write(name, ref, entry.source if entry is not None else "")

    async def records(self, after: str, limit: int) -> list[AdapterRecord]:
        """Describe the first `limit` names after `after`."""
        entries = self._entries()
        return await self._described([entries[name] for name in names_after(entries, after, limit)])

    async def record(self, name: str) -> AdapterRecord:
        """Describe one name. Raises UnknownModel."""
        entry = self._entries().get(name)
        if entry is None:
            raise UnknownModel(name)
        return (await self._described([entry]))[0]

    async def hold(self, name: str, seconds: float) -> None:
        """Let a name take no requests here for so long. Raises UnknownModel."""
        self._check_owner()
        await self.record(name)
        self._uses.held.hold(name, seconds)

    async def release(self, name: str) -> None:
        """Let a name take requests again. Raises UnknownModel."""
        self._check_owner()
        await self.record(name)
        self._uses.held.hold(name, 0.0)

    async def abort(self, name: str) -> int:
        """End the requests under a name. As AdapterCatalogue.abort."""
        self._check_owner()
        if not self._uses.in_flight(name):
            await self.record(name)
        return self._outputs.abort(name)

    async def cluster(self) -> ClusterRecord:
        """Describe this server as a cluster of one node."""
        memory = self._places.memory()
        node = NodeRecord(
            self._node, "serving", memory_bytes=memory.total_bytes, used_bytes=memory.used_bytes,
            cached=memory.resident,
        )  # fmt: skip
        epoch = self._file.epoch if self._file is not None else 0
        return ClusterRecord(epoch, 0, len(self._entries()), [node], replacements=0)

    def series(self, names: Sequence[str]) -> tuple[MetricSeries, ...]:
        """Tell how many names are held, and of each of these where its content is, its rank, and if it is pinned."""
        entries, places = self._entries(), self._places.places()
        samples: list[tuple[tuple[str, ...], float]] = []
        for name in names:
            entry = entries.get(name)
            if entry is not None and entry.ref is not None:
                asked, tier = self._settings.get(name), places.get(entry.ref.digest, "elsewhere")
                pinned = str(int(asked is not None and bool(asked.pinned)))
                samples.append(((name, str(entry.ref.rank), tier, pinned), 1.0))
        told = "Where an adapter's content is: on the device, or elsewhere."
        labels = ("adapter", "rank", "tier", "pinned")
        return MetricSeries("loraserve_adapter_residency", told, labels, samples), self._uses.series()

    def _check_owner(self) -> None:
        if not self._is_owner:
            raise AskRouter

    def _entries(self) -> Mapping[str, AdapterEntry]:
        return self._missing | {entry.name: entry for entry in self._registry.entries()}

    async def _described(self, entries: list[AdapterEntry]) -> list[AdapterRecord]:
        """Describe names; where their contents are is looked for in a thread."""
        digests = [entry.ref.digest for entry in entries if entry.ref is not None]
        tiers = await self._pool.run(lambda: self._places.tiers(digests))
        return [self._record(entry, tiers) for entry in entries]

    def _record(self, entry: AdapterEntry, tiers: Mapping[str, str]) -> AdapterRecord:
        ref, name = entry.ref, entry.name
        tier = tiers.get(ref.digest) if ref is not None else "folder"
        settings = self._settings.get(name, EntrySettings())
        return AdapterRecord(
            name=name,
            version=ref.digest if ref is not None else None,
            alias_of=self.aliases.of(name).target or None,
            source=entry.source,
            rank=ref.rank if ref is not None else None,
            bytes=ref.nbytes if ref is not None else None,
            effect=entry.effect,
            error=entry.refusal,
            pinned=settings.pinned or 0,
            max_requests=settings.max_requests or 0,
            copies=int(tier == "device"),
            tiers={} if tier is None else {self._node: tier},
            in_flight=self._uses.in_flight(name),
            last_use_s=self._uses.last_use_s(name),
            held_s=self._uses.held.left_s(name),
            targets=self.aliases.of(name).targets,
        )

    def _remember(self, name: str, settings: EntrySettings) -> None:
        """Take in what is asked for a name, beside what was asked before."""
        known = self._settings.get(name, EntrySettings(0, 0))
        given = {"pinned": settings.pinned, "max_requests": settings.max_requests}
        asked = replace(known, **{field: value for field, value in given.items() if value is not None})
        self._settings[name] = asked
        if asked.pinned:
            self._pinned.pin(name)
        else:
            self._pinned.unpin(name)

    async def _write(self, name: str, ref: AdapterRef, source: str) -> None:
        """Keep what a name means and what is asked for it; one that a peer told is not kept. Raises AdapterFailed."""
        if self._file is None or not source:
            return
        file, asked = self._file, self._settings.get(name, EntrySettings())
        alias = self.aliases.of(name)
        entry = CatalogueEntry(
            name, ref, source, pinned=asked.pinned or 0, alias_of=alias.target,
            max_requests=asked.max_requests or 0, targets=alias.targets,
        )  # fmt: skip
        owner = "" if name in self._registered else _OPTIONS
        await self._kept(lambda: file.put(RegisteredName(entry, owner)))

    async def _kept(self, write: Callable[[], R]) -> R:
        try:
            return await self._pool.run(write)
        except (NotWritten, Superseded) as error:
            raise AdapterFailed(str(error)) from error

    def _declare(self, entry: CatalogueEntry) -> None:
        """Let a name of the file mean its folder, unless this server's options give it. Waits for files."""
        try:
            is_known = entry.alias_of and self._registry.source(entry.alias_of) == entry.root
            roots = ANYWHERE if is_known else self._roots
            self._registry.declare(entry.name, source_of(entry.root), replaces=False, roots=roots)
        except (AdapterRefused, EngineError, InvalidSource) as error:
            _log.warning("adapter %s of the registry file is left out for now: %s", entry.name, error)
            folder, url = (None, entry.root) if is_url(entry.root) else (Path(entry.root), "")
            self._missing[entry.name] = AdapterEntry(entry.name, folder, None, refusal=str(error), url=url)
