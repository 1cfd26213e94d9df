"""Refuse JSON of more parts than a request can need, before it is decoded.

Decoding holds the interpreter's lock from the first byte to the last: a list of a million lists would keep every stream
waiting for half a second. Long texts cost little, and are not what is bounded here.
"""

from engine.api.errors import ApiError

_MOST_VALUES = 300_000
_MOST_TEXTS = 1 << 15
_MOST_CONTAINERS = 1 << 14
_SMALL_BYTES = _MOST_CONTAINERS  # too few bytes for more parts than that


def check_json_size(body: bytes, what: str) -> None:
    """Count a body's texts, lists, objects and other values; messages call it `what`. Raises ApiError (400).

    The counts are bounds from above: JSON that is not sound may be refused for its size.
    """
    if len(body) <= _SMALL_BYTES:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # no quote is left but those around texts
    _check(plain.count(b'"') // 2, _MOST_TEXTS, "texts", what)
    outside = b"".join(plain.split(b'"')[::2])
    containers = outside.count(b"[") + outside.count(b"{")
    _check(containers, _MOST_CONTAINERS, "lists and objects", what)
    _check(outside.count(b",") + containers, _MOST_VALUES, "values", what)


def _check(count: int, most: int, parts: str, what: str) -> None:
    if count > most:
        message = f"{what} has {count} {parts}, of {most} at most: send it as several requests"
        raise ApiError(400, message, None, "too_many_parts")
