"""Find adapters by nothing but their names, where the operator's template says, and remember what was not found.

A name is looked for once at a time by each who asks; who asks for it together is the engine's business.
"""

import logging
import threading
import time
from collections import OrderedDict

from lora.errors import AdapterRefused, SourceAbsent
from lora.sources.source_folders import SourceFolders
from lora.store.names.folder_reader import FolderReader
from lora.store.names.name_binder import NameBinder
from lora.store.names.named_adapter import NamedAdapter

_MOST_FAILED = 4096  # names
_log = logging.getLogger(__name__)


class FoundNames:
    """Looks for names at their source. `_lock` guards what failed, and nothing waits under it."""

    def __init__(self, binder: NameBinder, reader: FolderReader, fetched: SourceFolders) -> None:
        """Look where `fetched` has its template, if it has one."""
        self._binder, self._reader, self._fetched = binder, reader, fetched
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, tuple[float, AdapterRefused]] = OrderedDict()  # until when, and why

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
