"""Keep the adapters of a folder as its subfolders come, change and go, in a thread of its own.

A subfolder is taken up when it looked the same twice in a row, so that one which is still being written is not; or at
once when a request names it. What happens to one is logged in a line. A folder that hangs holds up this thread alone,
and those who name it.
"""

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path

from lora.errors import AdapterRefused, UnknownAdapter
from lora.format.folder_stamp import FolderStamp, folder_stamp
from lora.store.registry import AdapterRegistry

_REST = 20  # times as long as a look takes, however often it is asked for
_CLOSE_S = 1.0
_log = logging.getLogger(__name__)


class FolderWatch:
    """Declares the PEFT folders directly below `folder` by their names, but for hidden ones (a leading dot).

    Names that this node has from elsewhere are left alone, and so is a name that was unloaded, until its folder
    changes. One thread at a time calls `take_all` and `scan`; any thread calls the rest.
    """

    def __init__(self, registry: AdapterRegistry, folder: Path) -> None:
        """Know nothing of the folder yet."""
        self._registry = registry
        self._folder = folder
        self._seen: dict[str, FolderStamp] = {}  # at the last look
        self._taken: dict[str, FolderStamp] = {}  # as they were when they were declared, or passed over
        self._is_lost = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def take_all(self) -> None:
        """Declare what is there now."""
        self._seen = self._look()
        for name, stamp in self._seen.items():
            self._take(name, stamp)
        if not self._seen and folder_stamp(self._folder).is_adapter:
            _log.warning("%s holds no adapters but is one: give it as --lora NAME=DIR", self._folder)

    def scan(self) -> None:
        """Take up what has changed, and has not since the last look."""
        known = tuple(self._taken)  # a name that is taken while this looks is not gone
        before, self._seen = self._seen, self._look()
        for name, stamp in self._seen.items():
            if before.get(name) == stamp and not stamp.is_unreadable:
                self._take_up(name, stamp)
        for name in [name for name in known if name not in self._seen and name not in before]:
            self._taken.pop(name, None)
            with suppress(UnknownAdapter):
                self._registry.unload(name, self._folder / name)
                _log.info("adapter %s is unloaded, since its folder is gone", name)

    def path_of(self, name: str) -> Path | None:
        """Tell where the folder of a name would be; None if it can have none."""
        return None if name[:1] in ("", ".") or "/" in name else self._folder / name

    def take_now(self, name: str, stamp: FolderStamp) -> bool:
        """Declare the folder of a name that a request gives, which looks like `stamp`; False if it is not to be."""
        if not stamp.is_whole or self._taken.get(name) == stamp:
            return False
        self._take(name, stamp)
        return self._registry.folder(name) == self._folder / name

    def start(self, every_s: float) -> None:
        """Scan again and again, in a thread. What requests name is taken up at once from now on."""
        self._registry.found.look_in(self)
        self._thread = threading.Thread(
            target=self._run, args=(every_s,), name="adapter-folders", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Scan no more; a scan that hangs is not waited for."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self, every_s: float) -> None:
        pause_s = every_s
        while not self._closed.wait(pause_s):
            began_s = time.monotonic()
            try:
                self.scan()
            except Exception:  # noqa: BLE001 - the thread's boundary: the next scan may find all well
                _log.exception("the adapters of %s could not be brought up to date", self._folder)
            pause_s = max(every_s, _REST * (time.monotonic() - began_s))

    def _look(self) -> dict[str, FolderStamp]:
        """Look at every subfolder that is an adapter; if the folder itself cannot be read, all is as it was."""
        try:
            names = sorted(path.name for path in self._folder.iterdir() if path.name[0] != ".")
        except OSError as error:
            if not self._is_lost:
                _log.warning("%s cannot be read (%s): its adapters stay", self._folder, error.strerror)
            self._is_lost = True
            return self._seen
        self._is_lost = False
        stamps = {name: folder_stamp(self._folder / name) for name in names}
        return {name: stamp for name, stamp in stamps.items() if stamp.is_adapter}

    def _take_up(self, name: str, stamp: FolderStamp) -> None:
        path = self._folder / name
        if name in self._taken and self._registry.folder(name) == path:
            self._taken[name] = stamp
            try:
                self._registry.follow(name, path, stamp)
            except AdapterRefused as refusal:
                _log.warning("adapter %s keeps its content for now: %s", name, refusal.reason)
        elif self._taken.get(name) != stamp and stamp.is_whole and self._take(name, stamp):
            _log.info("adapter %s is found in %s", name, self._folder)

    def _take(self, name: str, stamp: FolderStamp) -> bool:
        """Declare a name, or say why not; tell whether it was declared."""
        path = self._folder / name
        try:
            is_new = self._registry.declare(name, path, replaces=False)
            self._taken[name] = stamp  # afterwards: who finds it here takes the name for unloaded
        except AdapterRefused as refusal:
            self._taken[name] = stamp
            _log.warning("%s is passed over: %s", path, refusal)
            return False
        if is_new:
            return True
        other = self._registry.folder(name)
        if other is None or not other.exists() or not path.samefile(other):
            _log.warning("%s is passed over: the name is given to %s", path, other)
        return False
