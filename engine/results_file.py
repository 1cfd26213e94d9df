"""Keep the results file of a batch, which also tells a later run what need not be done again.

It may not know what a result says. Lines are only ever appended whole; one that a kill tore is cut off when the
file is opened again. A file that is none of ours is refused and left as it is.
"""

from collections.abc import Generator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.errors import InvalidConfig

RESULT_PREFIX = "batch_req_"
_BEGINNING = b'{"id":"' + RESULT_PREFIX.encode()  # of every line, torn ones included
_DIGEST_BYTES = 16


class _Error(msgspec.Struct):
    line: int | None = None


class _Result(msgspec.Struct):
    """What is read back of a result: enough to tell whose it is."""

    custom_id: str | None
    error: _Error | None = None


def key_of(custom_id: str) -> bytes:
    """Return a line's identity by its own name: a digest, so that memory does not depend on names."""
    return blake2b(custom_id.encode(), digest_size=_DIGEST_BYTES).digest()


def key_of_line(number: int) -> bytes:
    """Return the identity of a line that has no name: its number in the input, digested."""
    return blake2b(b"%d" % number, digest_size=_DIGEST_BYTES, person=b"line").digest()


class ResultsFile:
    """An open results file, and the identities of the results that it held when it was opened."""

    def __init__(self, file: BinaryIO, done: frozenset[bytes]) -> None:
        self._file = file
        self._done = done

    def __contains__(self, key: bytes) -> bool:
        return key in self._done

    def append(self, result: object) -> None:
        """Write one result, whole and at once. Its first field is its id, which begins with RESULT_PREFIX."""
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()


@contextmanager
def open_results_file(path: Path) -> Generator[ResultsFile]:
    """Open the results file at `path`, a new one if there is none. Raises InvalidConfig if it cannot be used."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise InvalidConfig("output", str(path), f"it cannot be written: {error.strerror}") from error
    with file:
        yield ResultsFile(file, _recovered(file, path))


def _recovered(file: BinaryIO, path: Path) -> frozenset[bytes]:
    """Return the identities of all whole results, and cut off a torn last line."""
    done: set[bytes] = set()
    size = file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n") and _BEGINNING.startswith(line[: len(_BEGINNING)]):
            file.truncate(size)
            break
        try:
            done.add(_key(line))
        except ValueError as error:
            remedy = f"its line {number} is no batch result ({error}): give another file"
            raise InvalidConfig("output", str(path), remedy) from error
        size += len(line)
    return frozenset(done)


def _key(line: bytes) -> bytes:
    """Return whose result the line is. Raises ValueError if it is none."""
    result = msgspec.json.decode(line, type=_Result)
    if result.error is not None and result.error.line is not None:
        return key_of_line(result.error.line)
    if result.custom_id is None:
        raise ValueError("it has no custom_id")
    return key_of(result.custom_id)
