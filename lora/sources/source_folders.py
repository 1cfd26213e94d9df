"""Have adapters' files here that a URL names, and bound what they take: bytes, time, and questions in vain."""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from lora.daemon_threads import CallHangs, DeadlineCalls
from lora.errors import AdapterRefused
from lora.format.adapter_files import Flaw
from lora.format.allowed_roots import AdapterFolder, AllowedRoots
from lora.sources.allowed_sources import NOWHERE, AllowedSources
from lora.sources.base import SourceFiles
from lora.sources.fetched_folder import (
    FetchedFolder,
    FetchLimits,
    folder_bytes,
    last_use_ns,
    remove_unlocked,
)
from lora.sources.fsspec_files import FsspecFiles
from lora.sources.http_files import HttpFiles
from lora.sources.hub_files import HubFiles
from lora.sources.source_url import HTTP_SCHEMES, AdapterSource, SourceUrl

R = TypeVar("R")
_MOST_FETCHES = 16  # at once; what waits beyond is told to come again
_READ_S = 60.0  # beyond the fetch itself, to read what was fetched
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What an operator allows: which URLs, and at most so many bytes of one adapter's weights and seconds to fetch it.

    An absent name is not looked for again for `absent_s`. What was fetched is kept below `folder`, up to `kept_bytes`;
    without a folder, in one of this process's own that goes with it.
    """

    allowed: AllowedSources = NOWHERE
    most_bytes: int = 4 << 30
    timeout_s: float = 200.0
    absent_s: float = 60.0
    folder: Path | None = None
    kept_bytes: int = 16 << 30


NOTHING_FETCHED = SourceOptions()


class SourceFolders:
    """The fetched folders. Every method may be called from any thread; `reading` may wait.

    `_lock` guards the folder of this process's own; nothing waits under it.
    """

    def __init__(self, options: SourceOptions = NOTHING_FETCHED, weights_bytes: int = 0) -> None:
        """Fetch weights of at most `weights_bytes`, which is what could be served."""
        self._options = options
        self._limits = FetchLimits(min(options.most_bytes, weights_bytes), options.timeout_s)
        self._calls = DeadlineCalls(options.timeout_s + _READ_S, _MOST_FETCHES)
        self._http, self._hub, self._others = HttpFiles(options.allowed), HubFiles(), FsspecFiles()
        self._lock = threading.Lock()
        self._own: Path | None = None

    @property
    def absent_s(self) -> float:
        """How long what is not there is not looked for again."""
        return self._options.absent_s

    @property
    def finds_names(self) -> bool:
        """Tell whether adapters are looked for that are known by nothing but a name."""
        return self._options.allowed.template is not None

    def folder_of(self, source: AdapterSource, roots: AllowedRoots) -> AdapterFolder:
        """Tell which folder an adapter's files are read from: a URL's are fetched there first, but for `file` ones."""
        if isinstance(source, Path):
            return AdapterFolder(source, roots)
        if source.scheme == "file":
            bases = [base.path for base in self._options.allowed.bases if base.scheme == "file"]
            return AdapterFolder(source.path, AllowedRoots.below(bases))
        key = blake3(source.text.encode()).hexdigest()[:32]
        return AdapterFolder(self._root() / key, url=source.text)

    def by_name(self, name: str) -> AdapterFolder | None:
        """Tell where the template has an adapter of this name; None without one, or for a name that it cannot take."""
        template = self._options.allowed.template
        url = template.of(name) if template is not None else None
        return self.folder_of(url, AllowedRoots()) if url is not None else None

    def reading(self, name: str, folder: AdapterFolder, fresh: bool, call: Callable[[], R]) -> R:
        """Return or raise what `call` does with a folder whose files are fetched, and that nobody changes meanwhile.

        Unless `fresh`, what is whole here is not compared with its source. Raises AdapterRefused.
        """
        url = SourceUrl.parse(folder.url)
        if not self._options.allowed.allows(url):
            raise AdapterRefused(
                name, "its URL is outside of what this server may fetch from (--lora-source)"
            )

        def read() -> R:
            fetched = FetchedFolder(folder.path, self._limits)
            with fetched.locked():
                began_s = time.monotonic()
                try:
                    fetched.fetch(name, url, self._files(url.scheme), fresh)
                except OSError as error:
                    told = f"its files cannot be kept here ({error.strerror}): look at the disk"
                    raise AdapterRefused(name, told, may_pass=True) from error
                _log.debug("adapter %s was fetched in %.1f s", name, time.monotonic() - began_s)
                result = call()
            self._trim(folder.path)
            return result

        try:
            return self._calls.run(url.shown, read)
        except CallHangs as error:
            told = str(error).replace(error.what, "its source").replace("its disk or network folder", "it")
            raise AdapterRefused(name, told, may_pass=True) from error
        except Flaw as flaw:
            raise AdapterRefused(name, str(flaw), flaw.may_pass) from flaw

    def close(self) -> None:
        """Remove what was kept for this process alone."""
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)

    def _files(self, scheme: str) -> SourceFiles:
        if scheme in HTTP_SCHEMES:
            return self._http
        return self._hub if scheme == "hf" else self._others

    def _root(self) -> Path:
        if self._options.folder is not None:
            return self._options.folder
        with self._lock:
            if self._own is None:
                self._own = Path(tempfile.mkdtemp(prefix="loraserve-fetched-"))
            return self._own

    def _trim(self, used: Path) -> None:
        """Remove the folders longest unused until the rest is within the bound; never the one that was just `used`."""
        try:
            folders = sorted(self._root().iterdir(), key=last_use_ns)
        except OSError:
            return
        sizes = {folder: folder_bytes(folder) for folder in folders if folder.is_dir()}
        total = sum(sizes.values())
        for folder, nbytes in sizes.items():
            if total <= self._options.kept_bytes:
                break
            if folder != used:
                remove_unlocked(folder)
                total -= nbytes
