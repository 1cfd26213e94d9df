"""Keep the results file of a batch, which also tells a later run what need not be done again.

It may not know what a result says, but whether it is an error. Lines are only ever appended whole; one that a kill or
a full disk tore is cut off. A file that is none of ours is refused and left as it is.
"""

import fcntl
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from io import FileIO
from pathlib import Path

import msgspec

from engine.errors import InvalidConfig, OutputFailed

RESULT_PREFIX = "batch_req_"
_BEGINNING = b'{"id":"' + RESULT_PREFIX.encode()  # of every line, torn ones included
_DIGEST_BYTES = 16


class _Error(msgspec.Struct):
    line: int | None = None


class _Result(msgspec.Struct):
    """What is read back of a result: enough to tell whose it is, and whether it is an answer."""

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

    def __init__(self, file: FileIO, path: Path, done: dict[bytes, bool]) -> None:
        """Append to `file`, which holds the results `done`: by identity, whether each is an error."""
        self._file = file
        self._path = path
        self._done = done
        self._failed: OutputFailed | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._done

    def is_error(self, key: bytes) -> bool:
        """Tell whether the result that was there already is an error."""
        return self._done[key]

    def append(self, result: object) -> None:
        """Write one result, whole and at once. Its first field is its id, which begins with RESULT_PREFIX.

        Raises OutputFailed if it cannot be written, and from then on; what was torn by that is cut off.
        """
        if self._failed is not None:
            raise self._failed
        size = self._file.seek(0, os.SEEK_END)
        rest = memoryview(msgspec.json.encode(result) + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            with suppress(OSError):  # else the next run cuts it off
                self._file.truncate(size)
            self._failed = OutputFailed(self._path, error)
            raise self._failed from error

    def sync(self) -> None:
        """Have the system write what it holds back. Raises OutputFailed if it cannot."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputFailed(self._path, error) from error


@contextmanager
def open_results_file(path: Path, retry_errors: bool = False) -> Generator[ResultsFile]:
    """Open the results file at `path`, a new one if there is none; `retry_errors` takes the errors out of it first.

    Raises InvalidConfig if it cannot be used, also because another run uses it.
    """
    try:
        if retry_errors and path.exists():
            _drop_errors(path)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise InvalidConfig("output", str(path), f"it cannot be written: {error.strerror}") from error
    with file:
        _lock(file, path)
        results = ResultsFile(file, path, dict(_recovered(file, path)))
        yield results
        results.sync()


def _lock(file: FileIO, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise InvalidConfig("output", str(path), "it is no regular file: give one, so that a run can go on")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidConfig(
            "output", str(path), "another run writes it: wait, or give another file"
        ) from None
    except OSError:
        return  # a file system without locks


def _drop_errors(path: Path) -> None:
    """Replace the file by one that holds its answers only. Until that is whole the old one stays."""
    fresh = path.with_name(f"{path.name}.retry")
    try:
        with path.open("rb", buffering=0) as old, fresh.open("wb") as new:
            _lock(old, path)
            for line, (_, is_error) in _whole_results(old, path):
                if not is_error:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
            fresh.replace(path.resolve())
    finally:
        fresh.unlink(missing_ok=True)


def _recovered(file: FileIO, path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield the identities of all whole results and whether they are errors; then cut off a torn last line."""
    size = 0
    for line, found in _whole_results(file, path):
        size += len(line)
        yield found
    if size < file.seek(0, os.SEEK_END):
        file.truncate(size)


def _whole_results(file: FileIO, path: Path) -> Iterator[tuple[bytes, tuple[bytes, bool]]]:
    """Yield every line that is whole, with its identity and whether it is an error; raise InvalidConfig for others."""
    file.seek(0)
    with open(file.fileno(), "rb", closefd=False) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") and _BEGINNING.startswith(line[: len(_BEGINNING)]):
                return
            try:
                found = _identity(line)
            except ValueError as error:
                remedy = f"its line {number} is no batch result ({error}): give another file"
                raise InvalidConfig("output", str(path), remedy) from error
            yield line, found


def _identity(line: bytes) -> tuple[bytes, bool]:
    """Return whose result the line is and whether it is an error. Raises ValueError if it is none."""
    result = msgspec.json.decode(line, type=_Result)
    is_error = result.error is not None
    if result.error is not None and result.error.line is not None:
        return key_of_line(result.error.line), is_error
    if result.custom_id is None:
        raise ValueError("it has no custom_id")
    return key_of(result.custom_id), is_error
