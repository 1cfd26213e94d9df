"""Fetch one file of an adapter into a `.part` file, bounded in bytes and time, going on where it was cut."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lora.format.adapter_files import Flaw, PassingFlaw
from lora.sources.base import HeldFile, OpenedFile, SourceFiles
from lora.sources.source_url import SourceUrl

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 5  # in a row without a byte that is new
_PAUSE_S = 0.2  # before the second, and longer before each that follows
Note = Callable[[HeldFile], None]
"""Keep what is known of a `.part` file, so that a later download can go on with it."""


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file to fetch to `path`, of at most `most_bytes`, until `until_s` of the monotonic clock."""

    name: str
    path: Path
    most_bytes: int
    until_s: float

    def check_size(self, size: int | None) -> None:
        """Raise Flaw for a file that is too large, before it is read or while it is."""
        if size is not None and size > self.most_bytes:
            raise Flaw(
                f"{self.name} has {size} bytes or more at its source, at most {self.most_bytes} are fetched:"
                " is it the right file? --lora-source-max-bytes and the memory for adapters bound it"
            )

    def check_time(self) -> None:
        """Raise PassingFlaw at the deadline; what came is kept."""
        if time.monotonic() >= self.until_s:
            raise PassingFlaw(
                f"{self.name} was not fetched in time (--lora-source-timeout-s): try again, what came is kept"
            )


def fetch_file(
    files: SourceFiles, url: SourceUrl, wanted: WantedFile, held: HeldFile, note: Note
) -> HeldFile | None:
    """Fetch a file until it is whole; return what it is, or None if what is `held` whole is unchanged.

    Raises FileNotFoundError, Flaw for what is permanent, PassingFlaw for what is not. A source that says two sizes of
    one version is refused.
    """
    attempts, size = 0, None
    while True:
        wanted.check_time()
        before = held.nbytes
        try:
            opened = files.open(url, wanted.name, held)
            if opened is None:
                return None
            try:
                wanted.check_size(opened.size)
                if size is not None and opened.start and opened.size not in (None, size):
                    raise Flaw(f"{wanted.name} has {size} and {opened.size} bytes by its source: mend that")
                size = opened.size
                held = HeldFile(opened.version, opened.start)
                held = _read(opened, held, wanted, note)
            finally:
                opened.close()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = type(error).__name__ if not str(error) else str(error)
        else:
            if held.is_whole:
                return held
            reason = f"it broke off after {held.nbytes} of {size} bytes"
        held = replace(held, nbytes=_size_of(wanted.path)) if not held.is_whole else held
        attempts = 0 if held.nbytes > before else attempts + 1
        if attempts >= _ATTEMPTS:
            raise PassingFlaw(f"{wanted.name} cannot be fetched now ({reason}): try again, what came is kept")
        time.sleep(min(_PAUSE_S * 2**attempts, max(0.0, wanted.until_s - time.monotonic())))


def _read(opened: OpenedFile, held: HeldFile, wanted: WantedFile, note: Note) -> HeldFile:
    """Write what comes behind what is there; the file is whole if as many bytes came as were told, or none were."""
    descriptor = os.open(wanted.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb", buffering=0, closefd=True) as part:
        try:
            part.truncate(opened.start)
            part.seek(opened.start)
        except OSError as error:
            raise _full(error) from error
        note(held)
        while True:
            wanted.check_time()
            chunk = opened.read(_CHUNK_BYTES)
            if not chunk:
                break
            held = replace(held, nbytes=held.nbytes + len(chunk))
            wanted.check_size(held.nbytes)
            if opened.size is not None and held.nbytes > opened.size:
                raise Flaw(f"{wanted.name} is longer than the {opened.size} bytes that its source tells")
            try:
                part.write(chunk)
            except OSError as error:
                raise _full(error) from error
    return replace(held, is_whole=opened.size is None or held.nbytes == opened.size)


def _full(error: OSError) -> PassingFlaw:
    return PassingFlaw(
        f"its files cannot be kept here ({error.strerror}): free space, or give --adapter-cache-dir"
    )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
