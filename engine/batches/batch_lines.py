"""Read the lines of a batch's input: what each asks for, or why it is no request, and whose error that is.

It may not know who answers a line. Whatever a line holds, at most MAX_LINE_BYTES of it are in memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.api.errors import ApiError, refused
from engine.api.generation import ENDPOINTS, Endpoint
from engine.api.schema import decoded

MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_FIRST_FIELD = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*("(?:[^"\\]|\\.){1,512}")')


class BatchLine(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One line of the input. `metadata` is the client's own and may be anything."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw
    metadata: object = None

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that the line asks. Raises ApiError if there is none."""
        if self.method != "POST":
            raise refused("method", f"{self.method!r} is not supported: give 'POST'", "unknown_url")
        if self.url not in ENDPOINTS:
            raise refused(
                "url", f"{self.url!r} is not supported: give {' or '.join(ENDPOINTS)}", "unknown_url"
            )
        return ENDPOINTS[self.url]


class _Named(msgspec.Struct):
    """What is read of a line that breaks the schema: whose it is."""

    custom_id: str | None = None


class NotJsonLines(ValueError):
    """A file does not hold JSON lines as a whole; the message says why, and the remedy."""


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line that is no request, why, and its `custom_id` where that can be read."""

    custom_id: str | None
    error: ApiError


def read_line(raw: bytes) -> BatchLine | BrokenLine:
    """Return what a line asks for, or what is wrong with it."""
    try:
        if len(raw) > MAX_LINE_BYTES:
            raise ApiError(413, f"the line is over {MAX_LINE_BYTES} bytes: shorten it", None, "line_too_long")
        line = decoded(raw, BatchLine, "the line")
        if not line.custom_id:
            raise refused("custom_id", "give a text that is not empty", "invalid_value")
    except ApiError as error:
        return BrokenLine(_custom_id(raw), error)
    return line


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the text of all lines that are not blank.

    Of a line that is too long it yields the beginning only. A byte order mark at the file's start is left out.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, line


def count_lines(path: Path) -> int:
    """Count the lines that are not blank. Raises NotJsonLines for a file that has none."""
    with path.open("rb") as file:
        if file.read(2) in _UTF16:
            raise NotJsonLines("its encoding is UTF-16: save it as UTF-8")
        file.seek(0)
        return sum(1 for _ in numbered_lines(file))


def _custom_id(raw: bytes) -> str | None:
    """Return the name of a line that breaks the schema, or that is cut off or no JSON but begins with its name."""
    try:
        return msgspec.json.decode(raw, type=_Named).custom_id or None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    named = _FIRST_FIELD.match(raw)
    try:
        return (msgspec.json.decode(named[1], type=str) or None) if named else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
