"""Read an adapter's files as data that a stranger may have written.

Only a regular file is read, and only up to a bound: a pipe would block its reader for ever, and a device may have no
end. JSON is decoded with bounds on its size and its nesting.
"""

import json
import os
import stat
from errno import EAGAIN, EHOSTDOWN, EINTR, EIO, EMFILE, ENFILE, ENOMEM, ESTALE, ETIMEDOUT
from pathlib import Path
from typing import cast

from lora.format.allowed_roots import ANYWHERE, AllowedRoots, OutsideRoots

WEIGHTS_FILE = "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1 << 20
_MOST_NESTING = 32
_SHORT_CHARS = 60
_PASSING = frozenset({EIO, ESTALE, ETIMEDOUT, EHOSTDOWN, ENOMEM, EMFILE, ENFILE, EAGAIN, EINTR})


class Flaw(ValueError):
    """Why a folder cannot be served, before anyone asks under which name.

    It names files and no folder: clients are told it, whom the host's folders do not concern.
    """

    may_pass = False


class PassingFlaw(Flaw):
    """A folder that could not be read now, though it may be sound."""

    may_pass = True


def unreadable(what: str, error: OSError) -> Flaw:
    """Say that `what` cannot be read, and whether that may pass by itself."""
    if error.errno in _PASSING:
        return PassingFlaw(f"{what} cannot be read now ({error.strerror}): try again, or look at its disk")
    return Flaw(f"{what} cannot be read ({error.strerror}): check its permissions")


def read_regular_file(path: Path, most_bytes: int, roots: AllowedRoots = ANYWHERE) -> bytearray:
    """Read a whole regular file of at most `most_bytes`. Raises FileNotFoundError, or Flaw with the reason.

    Whatever the path means meanwhile, only what lies below a root is opened.

    It is read and not mapped: a file cut short meanwhile must not kill the server.
    """
    try:
        descriptor = roots.open(path)
        try:
            return _read_all(path, descriptor, most_bytes)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OutsideRoots as error:
        raise PassingFlaw(
            f"{path.name} leads outside of the folders that this server may load from: put the file itself there"
        ) from error
    except OSError as error:
        raise unreadable(path.name, error) from error


def read_json_object(path: Path, roots: AllowedRoots = ANYWHERE) -> dict[str, object]:
    """Read a JSON object that names no field twice. Raises FileNotFoundError, or Flaw with the reason."""
    content = read_regular_file(path, MOST_CONFIG_BYTES, roots)
    try:
        value: object = json.loads(content.decode(), object_pairs_hook=_distinct)
        check_nesting(value)
        # A lone surrogate can be escaped in JSON, and in no text that is sent on.
        json.dumps(value, ensure_ascii=False).encode()
    except Flaw as flaw:
        raise Flaw(f"{path.name} {flaw}: save the adapter again") from flaw
    except RecursionError as error:
        raise Flaw(f"{path.name} is nested deeper than {_MOST_NESTING}: save the adapter again") from error
    except ValueError as error:  # not JSON, or not even text
        raise Flaw(f"{path.name} is not valid JSON ({error}): save the adapter again") from error
    if not isinstance(value, dict):
        raise Flaw(
            f"{path.name} holds {type(value).__name__}, not an object of fields: save the adapter again"
        )
    return cast(dict[str, object], value)


def check_nesting(value: object) -> None:
    """Refuse JSON values that are nested so deep that code which follows them may run out of stack. Raises Flaw."""
    level = [value]
    for _ in range(_MOST_NESTING):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return
    raise Flaw(f"is nested deeper than {_MOST_NESTING}")


def short(value: object) -> str:
    """Show a value in a message: its start is enough to know it by."""
    text = repr(value)
    return text if len(text) <= _SHORT_CHARS else f"{text[: _SHORT_CHARS - 3]}..."


def _read_all(path: Path, descriptor: int, most_bytes: int) -> bytearray:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise Flaw(f"{path.name} is no regular file and cannot be read: put the adapter's own file there")
    if status.st_size > most_bytes:
        raise Flaw(
            f"{path.name} has {status.st_size} bytes, at most {most_bytes} are read: is it the right file?"
        )
    content = bytearray(status.st_size)
    filled = 0
    while filled < len(content) and (count := os.readv(descriptor, [memoryview(content)[filled:]])):
        filled += count
    del content[filled:]
    return content


def _inner(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast(dict[str, object], value).values())
    return cast(list[object], value) if isinstance(value, list) else []


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise Flaw(f"has the field {short(name)} twice")
        found[name] = value
    return found
