"""Readers: from what an operator wrote, on the command line or in a file, to a value. Each raises ValueError with
the remedy. Relative paths are relative to `base`: the working folder, or the file's."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transport.base import Address

Reader = Callable[[object, Path], Any]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]+)):(\d{1,5})", re.ASCII)
_UNITS = {"": 1} | {
    prefix + binary: (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kmgt", start=1)
    for binary in ("", "i")
}


def text(raw: object, base: Path) -> str:
    """Any text but an empty one."""
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError("give a text that is not empty")
    return raw


def secret(raw: object, base: Path) -> str:
    """A text that may travel in a header."""
    if not isinstance(raw, str) or not re.fullmatch(r"[!-~]+", raw):
        raise ValueError("give printable ASCII without spaces")
    return raw


def flag(raw: object, base: Path) -> bool:
    """True or false."""
    if not isinstance(raw, bool):
        raise ValueError("give true or false")
    return raw


def count(raw: object, base: Path) -> int:
    """A whole number from 1."""
    return _whole(raw, 1, 2**31)


def few(raw: object, base: Path) -> int:
    """A whole number from 1 to 4."""
    return _whole(raw, 1, 4)


def port(raw: object, base: Path) -> int:
    """A TCP port; 0 lets the system choose."""
    return _whole(raw, 0, 65535)


def address(raw: object, base: Path) -> Address:
    """HOST:PORT, or [HOST]:PORT where the host has colons."""
    written = _ADDRESS.fullmatch(raw) if isinstance(raw, str) else None
    if written is None:
        raise ValueError("give HOST:PORT")
    return Address(written[1] or written[2], port(written[3], base))


def seconds(raw: object, base: Path) -> float:
    """A duration from 0."""
    try:
        value = float(raw) if isinstance(raw, str | int | float) and not isinstance(raw, bool) else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("give a number of seconds, 0 or more")
    return value


def size(raw: object, base: Path) -> int:
    """A number of bytes: 2GiB, 512MiB, 1.5G (decimal), 1048576."""
    written = _SIZE.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if written:
        number = int(float(written[1]) * _UNITS[(written[2] or "").lower()])
    else:
        number = raw if isinstance(raw, int) and not isinstance(raw, bool) else 0
    if number < 1:
        raise ValueError("give a size like 2GiB, 512MiB or a number of bytes")
    return number


def path(raw: object, base: Path) -> Path:
    """A path, whether anything is there or not."""
    return base / Path(text(raw, base)).expanduser()


def folder(raw: object, base: Path) -> Path:
    """The path of a folder that exists."""
    found = path(raw, base)
    if not found.is_dir():
        raise ValueError("there is no such folder: give one that exists")
    return found


def lora(raw: object, base: Path) -> tuple[str, Path]:
    """An adapter's name and its folder."""
    name, separator, where = raw.partition("=") if isinstance(raw, str) else ("", "", "")
    if not (name and separator and where):
        raise ValueError("give NAME=DIR")
    return name, folder(where, base)


def model(raw: object, base: Path) -> str:
    """A folder, or else a hub id."""
    name = text(raw, base)
    beside = base / Path(name).expanduser()
    return str(beside) if beside.is_dir() else name


def secret_file(raw: object, base: Path) -> str:
    """The secret that a file holds, which its path does not tell."""
    try:
        return secret(path(raw, base).read_text(encoding="utf-8").strip(), base)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}): give a file") from error


def choice(*allowed: str) -> Reader:
    """One of some words."""

    def chosen(raw: object, base: Path) -> str:
        if raw not in allowed:
            raise ValueError(f"give one of {', '.join(allowed)}")
        return str(raw)

    return chosen


def _whole(raw: object, low: int, high: int) -> int:
    try:
        value = int(raw) if isinstance(raw, str | int) and not isinstance(raw, bool) else low - 1
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise ValueError(f"give a whole number from {low} to {high}")
    return value
