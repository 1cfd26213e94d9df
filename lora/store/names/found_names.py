"""Find adapters by nothing but their names: in a watched folder, or where the operator's template says.

What is not at a source is remembered. A name is looked for once at a time by each who asks; who asks for it together
is the engine's business.
"""

import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from lora.errors import AdapterRefused, SourceAbsent
from lora.format.folder_stamp import FolderStamp
from lora.sources.source_folders import SourceFolders
from lora.store.names.folder_reader import FolderReader
from lora.store.names.name_binder import NameBinder
from lora.store.names.named_adapter import NamedAdapter

_MOST_FAILED = 4096  # names
_log = logging.getLogger(__name__)


class WatchedFolders(Protocol):
    """Folders that are taken up as they come, and sooner for a name that is asked for."""

    def path_of(self, name: str) -> Path | None:
        """Tell where the folder of a name would be; None if it can have none."""
        ...

    def take_now(self, name: str, stamp: FolderStamp) -> bool:
        """Declare a name by its folder, which looks like `stamp`; False if it is not to be."""
        ...


class FoundNames:
    """Looks for names in the watched folders, and at their source.

    `_lock` guards what failed, and nothing waits under it.
    """

    def __init__(self, binder: NameBinder, reader: FolderReader, fetched: SourceFolders) -> None:
        """Look where `fetched` has its template, if it has one."""
        self._binder, self._reader, self._fetched = binder, reader, fetched
        self._watched: WatchedFolders | None = None
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, tuple[float, AdapterRefused]] = OrderedDict()  # until when, and why

    @property
    def looks(self) -> bool:
        """Tell whether a name that is not known is looked for."""
        return self._watched is not None or self._fetched.finds_names

    def look_in(self, watched: WatchedFolders) -> None:
        """Look for names among these folders too."""
        self._watched = watched

    def take_up(self, name: str) -> bool:
        """Declare a name by its folder if it has one that nobody has taken up yet.

        Raises AdapterRefused, which may pass, if the folder does not answer.
        """
        path = self._watched.path_of(name) if self._watched is not None else None
        if self._watched is None or path is None:
            return False
        return self._watched.take_now(name, self._reader.stamp(name, path))

    def discover(self, name: str) -> bool:
        """Let a name mean the adapter at its source, unless it has come to mean something; False if there is none.

        Raises AdapterRefused. Neither absence nor what does not pass by itself is looked for again for a while.
        """
        folder = self._fetched.by_name(name)
        if folder is None:
            return False
        if (known := self._failure(name)) is not None:
            if isinstance(known, SourceAbsent):
                return False
            raise known
        entry = NamedAdapter(name, folder)
        try:
            packed = self._reader.read(entry, folder)
        except AdapterRefused as refusal:
            if not refusal.may_pass:
                self._remember(name, refusal)
            if isinstance(refusal, SourceAbsent):
                return False
            raise
        self._binder.bind_packed(entry, packed, lambda current: current is None, tries=False)
        _log.info("adapter %s was found at its source", name)
        return True

    def _failure(self, name: str) -> AdapterRefused | None:
        with self._lock:
            until_s, why = self._failed.get(name, (0.0, None))
        return why if time.monotonic() < until_s else None

    def _remember(self, name: str, why: AdapterRefused) -> None:
        with self._lock:
            self._failed.pop(name, None)
            self._failed[name] = (time.monotonic() + self._fetched.absent_s, why)
            if len(self._failed) > _MOST_FAILED:
                self._failed.popitem(last=False)
