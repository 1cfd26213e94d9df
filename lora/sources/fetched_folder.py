"""Keep what was fetched of one adapter as a PEFT folder, locked while it is changed or read.

Several processes may share it. Files come as `.part` files, and take their names together when all are whole.
"""

import fcntl
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora.errors import SourceAbsent
from lora.format.adapter_files import MOST_CONFIG_BYTES, WEIGHTS_FILE, Flaw, PassingFlaw
from lora.format.companions import (
    COMPANION_FILES,
    MOST_TEMPLATE_BYTES,
    MOST_TOKENIZER_BYTES,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
)
from lora.format.peft_config import CONFIG_FILE
from lora.sources.base import NOTHING_HELD, HeldFile, SourceFiles, SourceForbidden
from lora.sources.file_download import WantedFile, fetch_file
from lora.sources.source_url import SourceUrl

_STATE_FILE = "fetched.json"
_LOCK_LOOK_S = 0.05
_BOUNDS = {TOKENIZER_FILE: MOST_TOKENIZER_BYTES, TEMPLATE_FILE: MOST_TEMPLATE_BYTES}


class _Fetched(msgspec.Struct, omit_defaults=True):
    """What is known of the files: those that have their names, and those that are still on their way."""

    is_complete: bool = False
    files: dict[str, tuple[str, int]] = msgspec.field(default_factory=dict[str, tuple[str, int]])
    parts: dict[str, str] = msgspec.field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Most bytes of weights, and most seconds for all files of one adapter."""

    weights_bytes: int
    timeout_s: float


class FetchedFolder:
    """One folder. Whoever calls `fetch` holds its lock."""

    def __init__(self, path: Path, limits: FetchLimits) -> None:
        self._path, self._limits = path, limits

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the folder alone among threads and processes; wait for that as long as a fetch may take.

        Raises PassingFlaw.
        """
        until_s = time.monotonic() + self._limits.timeout_s
        descriptor = self._lock(until_s)
        try:
            yield
        finally:
            os.close(descriptor)

    def fetch(self, name: str, url: SourceUrl, files: SourceFiles, fresh: bool) -> None:
        """Have all files here; unless `fresh`, what is complete is not compared with the source.

        Raises SourceAbsent, or Flaw with the reason.
        """
        state = self._read_state()
        if state.is_complete and not fresh:
            self._write_state(state)  # dates it: what is used last is kept longest
            return
        until_s = time.monotonic() + self._limits.timeout_s
        found: dict[str, HeldFile | None] = {}
        for file in (CONFIG_FILE, WEIGHTS_FILE, *COMPANION_FILES):
            bound = (
                self._limits.weights_bytes if file == WEIGHTS_FILE else _BOUNDS.get(file, MOST_CONFIG_BYTES)
            )
            wanted = WantedFile(file, self._part(file), bound, until_s)
            try:
                found[file] = self._fetch(files, url, wanted, state)
            except FileNotFoundError:
                if file == CONFIG_FILE:
                    raise SourceAbsent(name, f"its source has no {CONFIG_FILE}: check the URL") from None
                if file == WEIGHTS_FILE:
                    raise Flaw(
                        f"its source has no {WEIGHTS_FILE}: save the adapter there as one file"
                    ) from None
            except SourceForbidden:
                if file in (CONFIG_FILE, WEIGHTS_FILE):
                    raise
        self._take(state, found)

    def _fetch(
        self, files: SourceFiles, url: SourceUrl, wanted: WantedFile, state: _Fetched
    ) -> HeldFile | None:
        file = wanted.name
        held, part = NOTHING_HELD, state.parts.get(file)
        known = state.files.get(file)
        if known is not None and _size(self._path / file) == known[1]:
            held = HeldFile(known[0], known[1], is_whole=True)
        elif part and (nbytes := _size(wanted.path)):
            held = HeldFile(part, nbytes)

        def note(begun: HeldFile) -> None:
            if state.parts.get(file) != begun.version:
                state.parts[file] = begun.version
                self._write_state(state)

        return fetch_file(files, url, wanted, held, note)

    def _take(self, state: _Fetched, found: Mapping[str, HeldFile | None]) -> None:
        """Give what was fetched its names; what the source has no more is removed."""
        state.is_complete = False
        self._write_state(state)
        for file in (CONFIG_FILE, WEIGHTS_FILE, *COMPANION_FILES):
            if file not in found:
                (self._path / file).unlink(missing_ok=True)
                self._part(file).unlink(missing_ok=True)
                state.files.pop(file, None)
            elif (fetched := found[file]) is not None:
                self._part(file).replace(self._path / file)
                state.files[file] = (fetched.version, fetched.nbytes)
        state.parts.clear()
        state.is_complete = True
        self._write_state(state)

    def _part(self, file: str) -> Path:
        return self._path / f"{file}.part"

    def _lock(self, until_s: float) -> int:
        """Return a descriptor of the folder that holds its lock: of the folder that is there, not of a removed one."""
        while True:
            try:
                self._path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                told = f"its files cannot be kept here ({error.strerror}): give another --adapter-cache-dir"
                raise PassingFlaw(told) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except OSError:
                pass  # held by another, or removed meanwhile
            os.close(descriptor)
            if time.monotonic() >= until_s:
                raise PassingFlaw("another process has been fetching it all the time: try again")
            time.sleep(_LOCK_LOOK_S)

    def _read_state(self) -> _Fetched:
        try:
            return msgspec.json.decode((self._path / _STATE_FILE).read_bytes(), type=_Fetched)
        except (OSError, msgspec.MsgspecError):
            return _Fetched()

    def _write_state(self, state: _Fetched) -> None:
        written = self._path / f"{_STATE_FILE}.new"
        try:
            written.write_bytes(msgspec.json.encode(state))
            written.replace(self._path / _STATE_FILE)
        except OSError as error:
            told = (
                f"its files cannot be kept here ({error.strerror}): free space, or give --adapter-cache-dir"
            )
            raise PassingFlaw(told) from error


def last_use_ns(folder: Path) -> int:
    """Tell when a fetched folder was used last; 0 if that cannot be told."""
    with suppress(OSError):
        return (folder / _STATE_FILE).stat().st_mtime_ns
    return 0


def folder_bytes(folder: Path) -> int:
    """Count the bytes of a fetched folder's files."""
    try:
        return sum(_size(path) or 0 for path in folder.iterdir())
    except OSError:
        return 0


def remove_unlocked(folder: Path) -> None:
    """Remove a fetched folder, unless somebody holds its lock."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()
        finally:
            os.close(descriptor)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
