"""Define the types of options: how each is read from text, and which values it accepts.

A value is judged in one place, `OptionType.check`, whoever gave it: the command line, a file, the environment or
Python. Whatever is not accepted raises ValueError with the remedy. It may not know which option has which type.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lora.sources.allowed_sources import AllowedSources, SourceTemplate
from lora.sources.source_url import AdapterSource, SourceUrl, is_url
from transport.base import Address

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]+)):(\d{1,5})", re.ASCII)
_MOST_SECONDS = 10**9  # what every clock and lock can wait
_SECONDS_REMEDY = f"give a number of seconds from 0 to {_MOST_SECONDS}"
TEMPLATE_SYMBOLS = "{}\n"
"""A chat template has one of these, a file's name none."""

_KEY_NAME = re.compile(r"[0-9a-f]{8}")
_WEIGHT_REMEDY = "give the eight digits that logs call an API key by, =, and a weight from 0.001 to 1000"
_SIZE_REMEDY = "give a size like 2GiB, 512MiB or a number of bytes"
_UNITS = {"": 1} | {
    prefix + binary: (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kmgt", start=1)
    for binary in ("", "i")
}


@dataclass(frozen=True, slots=True)
class OptionType:
    """One type of value. `parse` reads a text, with relative paths relative to its second argument.

    What `parse` makes of a text is still to be checked; it raises ValueError only for what has no value at all.
    An option that may be given several times has a `container` of such values. A `secret` is never shown. Several
    values that are `separated` by commas may be written as one text.
    """

    metavar: str
    parse: Callable[[str, Path], object]
    check: Callable[[object], None]
    container: type = tuple
    secret: bool = False
    words: tuple[str, ...] = ()
    separated: bool = False


def _text(raw: str, base: Path) -> str:
    return raw


def _path(raw: str, base: Path) -> Path:
    if not raw.strip():
        raise ValueError("give a path that is not empty")
    return base / Path(raw).expanduser()


def _parse_template(raw: str, base: Path) -> object:
    """Return a template as it is, which a path's characters tell from a file."""
    return raw if any(symbol in raw for symbol in TEMPLATE_SYMBOLS) else _path(raw, base)


def _accept(remedy: str, accepts: Callable[[Any], bool]) -> Callable[[object], None]:
    """Make a check that raises ValueError with `remedy`."""

    def check(value: object) -> None:
        if not accepts(value):
            raise ValueError(remedy)

    return check


def _match(remedy: str, pattern: str) -> Callable[[object], None]:
    """Make a check that a text is wholly as a pattern says; it raises ValueError with `remedy`."""
    return _accept(remedy, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_path_or_text(value: object) -> bool:
    return isinstance(value, str | Path) and bool(str(value).strip())


def whole_number(metavar: str, low: int, high: int) -> OptionType:
    """Make the type of a whole number from `low` to `high`."""
    remedy = f"give a whole number from {low} to {high}"

    def parse(raw: str, base: Path) -> int:
        try:
            return int(raw)
        except ValueError:
            raise ValueError(remedy) from None

    return OptionType(metavar, parse, _accept(remedy, lambda value: _is_int(value) and low <= value <= high))


def one_of(literal: object, metavar: str) -> OptionType:
    """Make the type of the words that a Literal allows."""
    words = tuple(str(word) for word in get_args(literal))
    check = _accept(
        f"give one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words
    )
    return OptionType(metavar, _text, check, words=words)


def _parse_flag(raw: str, base: Path) -> bool:
    raise ValueError("give true or false")


def _parse_seconds(raw: str, base: Path) -> float:
    try:
        return float(raw)
    except ValueError:
        raise ValueError(_SECONDS_REMEDY) from None


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_SECONDS


def _parse_size(raw: str, base: Path) -> int:
    written = _SIZE.fullmatch(raw.strip())
    if written is None:
        raise ValueError(_SIZE_REMEDY)
    return int(float(written[1]) * _UNITS[(written[2] or "").lower()])


def _parse_address(raw: str, base: Path) -> Address:
    written = _ADDRESS.fullmatch(raw)
    if written is None:
        raise ValueError("give HOST:PORT, or [HOST]:PORT where the host has colons")
    return Address(written[1] or written[2], int(written[3]))


def _check_address(value: object) -> None:
    if not isinstance(value, Address):
        raise ValueError("give HOST:PORT (in Python an Address)")
    PORT.check(value.port)


def _check_folder(value: object) -> None:
    _check_path(value)
    if not Path(str(value)).is_dir():
        raise ValueError("there is no such folder: give one that exists")


def _check_readable(value: object) -> None:
    _check_path(value)
    try:
        Path(str(value)).open("rb").close()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}): give a file") from error


def _parse_lora(raw: str, base: Path) -> tuple[str, str | Path]:
    name, separator, folder = raw.partition("=")
    if not (name and separator and folder):
        raise ValueError("give NAME=DIR or NAME=URL")
    return name, folder if is_url(folder) else _path(folder, base)


def _check_lora(value: object) -> None:
    """Accept a pair of a name and a folder, which in Python may be a text as well, or a URL."""
    match value:
        case (str(name), str() | Path() as folder) if name:
            source = operator_source(folder)
            if isinstance(source, Path):
                _check_folder(source)
        case _:
            raise ValueError("give NAME=DIR (in Python a mapping from names to folders)")


def operator_source(given: str | Path) -> AdapterSource:
    """Read the place of an adapter that an operator names; a `file` URL is but a path. Raises ValueError."""
    if isinstance(given, Path) or not is_url(given):
        return Path(given)
    url = SourceUrl.parse(given)
    return url.path if url.scheme == "file" else url


def _check_source(value: object) -> None:
    """Accept a URL that adapters may lie below."""
    if not isinstance(value, str):
        raise ValueError("give a URL")
    AllowedSources.of((value,))


def _check_template(value: object) -> None:
    """Accept a URL with a place for a name."""
    if not isinstance(value, str):
        raise ValueError("give a URL with {name} in it")
    SourceTemplate.parse(value)


def _parse_weight(raw: str, base: Path) -> tuple[str, float]:
    name, _, weight = raw.partition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise ValueError(_WEIGHT_REMEDY) from None


def _check_weight(value: object) -> None:
    """Accept a pair of a key's name and a weight."""
    match value:
        case (str(name), int() | float() as weight) if _KEY_NAME.fullmatch(name) and 1e-3 <= weight <= 1e3:
            pass
        case _:
            raise ValueError(_WEIGHT_REMEDY)


def is_folder(path: str | Path) -> bool:
    """Tell whether a path is a folder's; what no path can be is none."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names that are too long


def _parse_model(raw: str, base: Path) -> str:
    beside = base / Path(raw).expanduser()
    return str(beside) if raw.strip() and is_folder(beside) else raw


def lora_table(value: object) -> object:
    """Return a TOML table of adapters as a list of NAME=DIR, and anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    return [f"{name}={folder}" for name, folder in value.items()]  # pyright: ignore[reportUnknownVariableType]


def separate(value: object) -> object:
    """Return a text, or a list of texts, as the list of what commas separate; and anything else as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):  # pyright: ignore[reportUnknownVariableType]
        return [part.strip() for part in ",".join(value).split(",")] if value else value  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    return value  # pyright: ignore[reportUnknownVariableType]


_check_path = _accept("give a path (in Python a pathlib.Path)", lambda value: isinstance(value, Path))

AMOUNT = whole_number("N", 0, 2**31)
COUNT = whole_number("N", 1, 2**31)
LENGTH = whole_number("N", 2, 2**31)  # a prompt's token and an answer's
PORT = whole_number("PORT", 0, 65535)
FLAG = OptionType("", _parse_flag, _accept("give true or false", lambda value: isinstance(value, bool)))
SECONDS = OptionType("S", _parse_seconds, _accept(_SECONDS_REMEDY, _is_seconds))
SIZE = OptionType(
    "SIZE", _parse_size,
    _accept(_SIZE_REMEDY, lambda value: _is_int(value) and value > 0),
)  # fmt: skip
TEXT = OptionType(
    "NAME", _text,
    _accept("give a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip())),
)  # fmt: skip
SECRET = OptionType("KEY", _text, _match("give printable ASCII without spaces", r"[!-~]+"), secret=True)
KEYS = OptionType(
    "KEY", _text, _match("give printable ASCII without spaces or commas", r"[!-+\--~]+"),
    secret=True, separated=True,
)  # fmt: skip
ORIGINS = OptionType(
    "ORIGIN", _text,
    _match(
        "give an origin like https://app.example:8443, without a path, or *",
        r"\*|[a-z][a-z0-9+.-]*://[^/?#\s,]+",
    ),
    separated=True,
)  # fmt: skip
ENDPOINT = OptionType(
    "URL", _text,
    _match(
        "give a URL like http://collector.example:4317, or with https",
        r"https?://[^/?#\s,:@]+:[0-9]{1,5}/?",
    ),
)  # fmt: skip
MODEL = OptionType(
    "DIR|ID", _parse_model,
    _accept("give a folder or a hub id", _is_path_or_text),
)  # fmt: skip
CHAT_TEMPLATE = OptionType(
    "FILE|TEXT", _parse_template,
    _accept("give a file, or the template itself", _is_path_or_text),
)  # fmt: skip
FILE = OptionType("FILE", _path, _check_path)
READABLE_FILE = OptionType("FILE", _path, _check_readable)
DIRECTORY = OptionType("DIR", _path, _check_path)
FOLDER = OptionType("DIR", _path, _check_folder)
ADDRESS = OptionType("HOST:PORT", _parse_address, _check_address)
WEIGHT = OptionType("KEY=WEIGHT", _parse_weight, _check_weight, container=dict)
SOURCE = OptionType("URL", _text, _check_source, secret=True)  # it may have been given with a password
TEMPLATE = OptionType("URL", _text, _check_template, secret=True)
LORA = OptionType("NAME=DIR|URL", _parse_lora, _check_lora, container=dict)

WRITTEN = (SIZE, FILE, READABLE_FILE, DIRECTORY, FOLDER, ADDRESS)
"""Types whose values may be texts in Python too, as they are on the command line."""
