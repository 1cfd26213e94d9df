"""Spoil JSON values and bytes: at random places, with the values that readers stumble over.

Every choice comes from the `random.Random` that is given, so that a seed tells all cases.
"""

import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

TEXTS = (
    "",
    " ",
    "a" * 5000,
    "\x00",
    "\ud800",
    "é😀",
    "{{ x }}",
    "(a|b)*",
    "(",
    "all-linear",
    "model.layers.1",
    "Sequence",
    "../..",
    "null",
    "1",
    "-1",
    "nan",
    "[" * 300,
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31,
    2**31 - 1,
    -(2**31),
    2**63,
    -(2**63),
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-308,
)
SCALARS: tuple[object, ...] = (None, True, False, float("nan"), float("inf"), *NUMBERS, *TEXTS)
STRETCHES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"9" * 40,
    b"[" * 5000,
    b'{"a":' * 5000,
    b"-1",
    b"null",
    b'"',
    b"\\ud800",
    b"\xef\xbb\xbf",
    b",",
)
DTYPES = ("F32", "BF16", "F16", "F64", "I8", "U8", "I64", "BOOL", "F4", "F8_E4M3", "C64", "X", "")
_MOST_DEPTH = 3


def any_value(chance: random.Random, depth: int = 0) -> object:
    """Draw a value: mostly a scalar, sometimes lists and objects of some."""
    kind = chance.random()
    if kind < 0.8 or depth == _MOST_DEPTH:
        return chance.choice(SCALARS)
    if kind < 0.9:
        return [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {
        chance.choice(("type", "text", "x", "")): any_value(chance, depth + 1)
        for _ in range(chance.randrange(3))
    }


def spoilt_value(chance: random.Random, value: Any, keys: Sequence[str] = ()) -> Any:
    """Return a copy of a JSON value that differs in one to three places; `keys` are further fields of its objects."""
    copy = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        copy = _spoil(chance, copy, keys)
    return copy


def _spoil(chance: random.Random, value: Any, keys: Sequence[str]) -> Any:
    """Change one place, at any depth."""
    if isinstance(value, dict):
        return _spoil_object(chance, cast(dict[str, Any], value), keys)
    if isinstance(value, list):
        items = cast(list[Any], value)
        place = chance.randrange(len(items) + 1)
        if place == len(items) or chance.random() < 0.2:
            return items[:place] + [any_value(chance)] * chance.choice((1, 1, 2, 300)) + items[place:]
        return [_spoil(chance, item, keys) if i == place else item for i, item in enumerate(items)]
    return _near(chance, value) if chance.random() < 0.5 else any_value(chance)


def _near(chance: random.Random, value: Any) -> Any:
    """Draw a value of the same kind, which a reader may well take."""
    if isinstance(value, bool) or value is None:
        return chance.choice((True, False, None))
    if isinstance(value, int | float):
        return chance.choice((0, 1, 2, 3, 5, 0.5, value + 1, -value))
    return chance.choice(("", " ", "x", "a\n", "é😀", f"{value} ", f"{value}{value}", str(value)[1:]))


def _spoil_object(chance: random.Random, fields: dict[str, Any], keys: Sequence[str]) -> Any:
    kind, names = chance.random(), list(fields)
    if kind < 0.3 and keys:
        return fields | {chance.choice(keys): any_value(chance)}
    if kind < 0.35 or not names:
        return fields | {chance.choice(("surprise", "", "\ud800", "a" * 300)): any_value(chance)}
    name = chance.choice(names)
    if kind < 0.45:
        return {key: value for key, value in fields.items() if key != name}
    if kind < 0.5:
        return any_value(chance)
    if kind < 0.7:
        return fields | {name: any_value(chance)}
    return fields | {name: _spoil(chance, fields[name], keys)}


def spoilt_bytes(chance: random.Random, content: bytes, first: int = 1 << 20) -> bytes:
    """Return bytes that differ in one to three stretches, all of which begin within the `first` bytes."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(min(first, len(content)) + 1)
        length = chance.choice((0, 1, 1, 2, 8, 300))
        new = chance.choice((chance.choice(STRETCHES), chance.randbytes(chance.choice((1, 1, 4, 16)))))
        content = content[:at] + new + content[at + length :]
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.1 else content


def spoilt_json(chance: random.Random, value: Any, keys: Sequence[str] = ()) -> bytes:
    """Return a spoilt value as JSON, now and then with spoilt bytes as well."""
    content = json.dumps(spoilt_value(chance, value, keys)).encode()
    return spoilt_bytes(chance, content) if chance.random() < 0.2 else content


def spoilt_safetensors(chance: random.Random, content: bytes) -> bytes:
    """Return a safetensors file whose header, lengths or bytes are spoilt."""
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    kind = chance.random()
    if kind < 0.4:
        return spoilt_bytes(chance, content, first=length + 8)
    if kind < 0.5:
        return spoilt_bytes(chance, content, first=len(content))
    name = chance.choice([name for name in header if name != "__metadata__"])
    change = chance.choice((_other_dtype, _other_shape, _other_offsets, _renamed_tensor, _any_field))
    changed = json.dumps(change(chance, header, name)).encode()
    said = len(changed) if chance.random() < 0.9 else chance.choice((0, 1, 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + changed + content[8 + length :]


Header = Mapping[str, Any]


def _other_dtype(chance: random.Random, header: Header, name: str) -> object:
    return {**header, name: {**header[name], "dtype": chance.choice(DTYPES)}}


def _other_shape(chance: random.Random, header: Header, name: str) -> object:
    return {**header, name: {**header[name], "shape": spoilt_value(chance, header[name]["shape"])}}


def _other_offsets(chance: random.Random, header: Header, name: str) -> object:
    return {
        **header,
        name: {**header[name], "data_offsets": spoilt_value(chance, header[name]["data_offsets"])},
    }


def _renamed_tensor(chance: random.Random, header: Header, name: str) -> object:
    other = chance.choice((chance.choice(TEXTS), name + ".weight", name[: chance.randrange(len(name))]))
    return {other if key == name else key: value for key, value in header.items()}


def _any_field(chance: random.Random, header: Header, name: str) -> object:
    return spoilt_value(chance, {**header})


def file_spoiler(name: str, content: bytes, keys: Sequence[str] = ()) -> Callable[[random.Random], bytes]:
    """Return what draws spoilt contents of a file, by its kind."""
    if name.endswith(".safetensors"):
        return lambda chance: spoilt_safetensors(chance, content)
    value: Any = json.loads(content)
    return lambda chance: (
        spoilt_json(chance, value, keys) if chance.random() < 0.8 else spoilt_bytes(chance, content)
    )
