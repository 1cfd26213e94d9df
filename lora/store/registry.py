"""Keep what adapter names mean at this node.

Folders are read here, and peers asked, before a name means something; afterwards a name is a dictionary's key.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from lora.adapter import NAME_RULE, AdapterEntry, AdapterRef, is_name
from lora.errors import AdapterRefused, AdapterUnreachable, InvalidName, NameTaken, UnknownAdapter
from lora.format.allowed_roots import ANYWHERE, AdapterFolder, AllowedRoots
from lora.format.companions import NO_COMPANIONS, Companions
from lora.format.folder_stamp import FolderStamp
from lora.format.peft import PackedAdapter
from lora.memory.residency import Content
from lora.peers.published_manifests import PublishedManifests
from lora.sources.source_folders import SourceFolders
from lora.sources.source_url import AdapterSource, SourceUrl
from lora.store.loader import AdapterLoader
from lora.store.names.folder_reader import FolderReader, check_is_adapter
from lora.store.names.found_names import FoundNames
from lora.store.names.name_binder import NameBinder
from lora.store.names.name_table import NameTable
from lora.store.names.named_adapter import NamedAdapter
from lora.store.names.remote_names import RemoteNames
from lora.store.names.trial import ContentTrials
from lora.store.tier_chain import TierChain

_log = logging.getLogger(__name__)


class AdapterRegistry:
    """Names and what they mean. Every method may be called from any thread.

    The lock is NameTable's, which says in what order locks are taken.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        tiers: TierChain,
        published: PublishedManifests | None,
        most_bytes: int,
        fetched: SourceFolders,
    ) -> None:
        """Know no name; no adapter may be larger than `most_bytes`. `fetched` has the files that URLs name."""
        self._loader = loader
        self._contents = loader.contents
        self._fetched = fetched
        self.trials = ContentTrials(self._contents)
        self._reader = FolderReader(tiers, most_bytes)
        self._table = NameTable(self._contents, published)
        self._binder = NameBinder(self._table, loader, tiers, self.trials)
        self.found = FoundNames(self._binder, self._reader, fetched)
        self.remote = RemoteNames(self._table, self._contents, tiers, most_bytes)
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

    def declare(
        self, name: str, source: AdapterSource, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> bool:
        """Remember a name and its PEFT folder or URL; it is read when first asked for, a folder from below `roots`.

        Return False if it does not replace what this node knows by that name. Raises InvalidName or another
        AdapterRefused.
        """
        self.check_name(name)
        folder = self._fetched.folder_of(source, roots)
        if not folder.url:
            check_is_adapter(name, folder.path)
        with self._table.lock:
            current = self._table.by_name.get(name)
            if current is not None and current.folder is not None and not replaces:
                return False
            self._table.unbind(current)
            self._table.by_name[name] = NamedAdapter(name, folder)
        self._contents.advance()
        return True

    def load(
        self, name: str, source: AdapterSource, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        """Read, check and keep an adapter, then let `name` mean it; what the name meant before stays until unused.

        Whenever a folder's files are read, they must lie below `roots`.

        Resident on return if there are free pages. Raises InvalidName, NameTaken for a name that it would have to
        replace and may not, or another AdapterRefused; then nothing has changed.
        """
        self.check_name(name)
        if not replaces and name in self.names():
            raise NameTaken(name)
        folder = self._fetched.folder_of(source, roots)
        entry = NamedAdapter(name, folder)
        packed = self._reader.read(entry, folder)
        if not self._binder.bind_packed(
            entry, packed, lambda current: replaces or current is None, tries=True
        ):
            raise NameTaken(name)
        return packed.ref

    def fetch(self, name: str, url: SourceUrl) -> tuple[PackedAdapter, AdapterFolder]:
        """Read and keep what is at a URL, though no name comes to mean it. Raises AdapterRefused."""
        folder = self._fetched.folder_of(url, ANYWHERE)
        return self._reader.read(NamedAdapter(name, folder), folder), folder

    def alias(self, name: str, target: str) -> AdapterEntry:
        """Let `name` mean, in one step, the content that `target` means now; return what is told of it.

        Raises InvalidName, and for the target as `resolve`.
        """
        self.check_name(name)
        while True:
            ref = self.resolve(target)
            with self._table.lock:
                known = self._table.by_name.get(target)
                layout = self._contents.layout(ref.digest)
                if known is not None and known.ref == ref and layout is not None:
                    entry = known.as_alias(name)
                    self._table.bind(entry, ref, layout)
                    break
        self._contents.advance()
        return entry.entry()

    def folder(self, name: str) -> Path | None:
        """Tell the folder of a name that this node owns."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
            return entry.path if entry else None

    def source(self, name: str) -> str:
        """Tell what names the place of a name that this node owns: a path, or a URL with all that it has."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
            return entry.folder.source if entry is not None and entry.folder is not None else ""

    def may_fetch(self, name: str) -> bool:
        """Tell whether to resolve a name may take as long as a source does."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
            if entry is None:
                return self.found.looks
            return entry.ref is None and entry.folder is not None and bool(entry.folder.url)

    def follow(self, name: str, folder: Path, stamp: FolderStamp) -> None:
        """Read the folder of a name again if it was read before and has changed since.

        What the name meant stays until the new content is there, and if there is none. Raises AdapterRefused for
        what may pass.
        """
        with self._table.lock:
            entry = self._table.by_name.get(name)
            if entry is None or entry.folder is None or entry.path != folder or entry.ref is None:
                return
            if stamp in (entry.stamp, entry.refused):
                return
        fresh = NamedAdapter(name, entry.folder)
        try:
            packed = self._reader.read(fresh, entry.folder)
            bound = self._binder.bind_packed(fresh, packed, lambda current: current is entry, tries=True)
        except AdapterRefused as refusal:
            if refusal.may_pass:
                raise
            entry.refuse(stamp, refusal)
            _log.warning("adapter %s keeps its content, since what its folder holds now is refused", name)
            return
        if bound:
            _log.info("adapter %s is now %s, since its folder has changed", name, packed.ref.digest[:12])

    def known(self, name: str) -> AdapterRef | None:
        """Return what `name` means, if that can be told without waiting."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
            return None if entry is None or self._needs_trial(entry) else entry.ref

    def resolve(self, name: str) -> AdapterRef:
        """Return what `name` means; a declared adapter is read first, and peers are asked for one that is not known.

        What was not tried yet is tried, unless that had to wait for requests. Raises UnknownAdapter, AdapterRefused;
        AdapterUnreachable if not all peers could be asked.
        """
        while True:
            with self._table.lock:
                entry = self._table.by_name.get(name)
                ref = entry.ref if entry is not None else None
            if entry is not None and ref is not None:
                if not self._needs_trial(entry) or self._try_bound(entry, ref):
                    return ref
            elif entry is None or entry.folder is None:
                self._discover(name)
            else:
                self._read(entry)

    def companions(self, name: str) -> Companions:
        """Return what changes how the adapter is asked. Raises as `resolve`."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
            if entry is not None and entry.ref is not None:
                return entry.companions
        self.resolve(name)
        with self._table.lock:
            return self._table.by_name[name].companions if name in self._table.by_name else NO_COMPANIONS

    def unload(self, name: str, folder: Path | None = None) -> None:
        """Forget a name at once; its content goes when no live request uses it.

        Raises UnknownAdapter, also for a name that does not mean `folder` if one is given.
        """
        with self._table.lock:
            entry = self._table.by_name.get(name)
            if entry is None or folder not in (None, entry.path):
                raise UnknownAdapter(name)
            self._table.unbind(self._table.by_name.pop(name))
        self._contents.advance()

    def names(self) -> tuple[str, ...]:
        """List all names, in order of registration."""
        return self._table.names()

    def entries(self) -> tuple[AdapterEntry, ...]:
        """List all names with what they mean."""
        return self._table.entries()

    def lose(self, content: Content, error: Exception) -> None:
        """Give up a content that cannot be had: its names are read, or peers asked for them, afresh.

        Both in one step, so that no name comes to mean it in between.
        """
        with self._table.lock:
            self._contents.fail(content, error)
            entries = tuple(self._table.by_name.values())
            for entry in [each for each in entries if each.ref is not None and each.ref == content.ref]:
                self._table.lose(entry)
        self._contents.advance()

    # For peers

    def declares(self, name: str) -> bool:
        """Tell whether `name` has a folder that was not read yet."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
            folder = entry.folder if entry is not None and entry.ref is None else None
            return folder is not None and not folder.url  # what is fetched takes longer than a peer waits

    def read(self, name: str) -> None:
        """Read the folder of a declared name. Raises AdapterRefused."""
        with self._table.lock:
            entry = self._table.by_name.get(name)
        if entry is not None:
            self._read(entry)

    def _discover(self, name: str) -> None:
        """Let a name that is not known mean its watched folder, what peers say, or what the template finds."""
        if name not in self._reserved and self.found.take_up(name):
            return
        try:
            self.remote.discover(name)
        except (UnknownAdapter, AdapterUnreachable):
            if name in self._reserved or not self.found.discover(name):
                raise

    def _read(self, entry: NamedAdapter) -> None:
        """Let a declared name mean what its folder holds, unless it means something. Raises AdapterRefused."""
        with entry.packing:
            if entry.ref is None and entry.folder is not None:
                packed = self._reader.read(entry, entry.folder)
                self._binder.bind_packed(entry, packed, lambda current: current is entry, tries=False)

    def _needs_trial(self, entry: NamedAdapter) -> bool:
        return self.trials.are_made and not entry.tried

    def _try_bound(self, entry: NamedAdapter, ref: AdapterRef) -> bool:
        """Try what the entry's name means, which means nothing if that is refused; False if it means else by now."""
        with entry.packing:
            if entry.ref != ref:
                return False
            if not entry.tried:
                try:
                    self.trials.run(entry, ref, waits=False)
                except AdapterRefused as refusal:
                    if not refusal.may_pass:
                        self._lose(entry)
                    raise
            return True

    def _lose(self, entry: NamedAdapter) -> None:
        with self._table.lock:
            self._table.lose(entry)
        self._contents.advance()
