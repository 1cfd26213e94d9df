"""Ledger: the results file of a batch, which is also its memory: what it holds need not be done again.

It may not know what a result says. Lines are only ever appended whole; one that a kill tore is cut off when the
file is opened again.
"""

from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from engine.errors import InvalidConfig

_CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = 16


class _Error(msgspec.Struct):
    line: int | None = None


class _Result(msgspec.Struct):
    """What is read back of a result: enough to tell whose it is."""

    custom_id: str | None
    error: _Error | None = None


def key_of(custom_id: str) -> bytes:
    """A line's identity where it has a name of its own. A digest, so that memory does not depend on names."""
    return blake2b(custom_id.encode(), digest_size=_DIGEST_BYTES).digest()


def key_of_line(number: int) -> bytes:
    """The identity of a line that has none: its number in the input."""
    return blake2b(b"line:%d" % number, digest_size=_DIGEST_BYTES, person=b"line").digest()


class Ledger:
    """Use as `with`. `done` counts the results found when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: set[bytes] = set()
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InvalidConfig("output", str(path), f"it cannot be written: {error.strerror}") from error

    def __enter__(self) -> "Ledger":
        _cut_torn_line(self._file)
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            self._done.add(self._key(number, line))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._done

    @property
    def done(self) -> int:
        """Results that the file held when it was opened."""
        return len(self._done)

    def append(self, result: object) -> None:
        """Write one result, whole and at once."""
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()

    def _key(self, number: int, line: bytes) -> bytes:
        try:
            result = msgspec.json.decode(line, type=_Result)
        except msgspec.DecodeError as error:
            remedy = f"its line {number} is no batch result ({error}): give another file"
            raise InvalidConfig("output", str(self._path), remedy) from error
        if result.error is not None and result.error.line is not None:
            return key_of_line(result.error.line)
        if result.custom_id is None:
            remedy = f"its line {number} has no custom_id: give another file"
            raise InvalidConfig("output", str(self._path), remedy)
        return key_of(result.custom_id)


def _cut_torn_line(file: BinaryIO) -> None:
    """Drop what follows the last line break."""
    end = file.seek(0, 2)
    while end > 0:
        start = max(0, end - _CHUNK_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
