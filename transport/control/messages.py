"""The messages of the control connection: what two nodes may say to each other, and how it looks on the wire.

A frame is four bytes of length, big-endian, and that many bytes of JSON: plain names and numbers, never pickle. What
arrives is checked field by field before anybody sees it. Bulk bytes follow a `Bytes` message, unframed.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields

from transport import errors
from transport.base import RemoteRegion
from transport.errors import RegionRefused, TransportError, WireError

VERSION = 2
LENGTH = struct.Struct(">I")
MOST_FRAME_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Hello:
    """Puller, first: who it is, and a number that the source has to prove its token with."""

    version: int
    node: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Challenge:
    """Source: who it is, its own proof, and a number for the puller's."""

    version: int
    node: str
    nonce: str
    proof: str


@dataclass(frozen=True, slots=True)
class Proof:
    """Puller: that it has the token too."""

    proof: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Source: the data paths it offers, each with what a puller needs to judge whether it can use it."""

    doors: dict[str, str]


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Puller: pin `name` for `hold_s`; the bytes will be read through `door`."""

    name: str
    hold_s: float
    door: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Source: pinned. `card` is what the door needs to read the regions; empty if it is the last of this connection."""

    ticket: int
    hold_s: float
    card: str
    regions: tuple[RemoteRegion, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Puller: send me the bytes of the lease, which ends it. It need not wait for the grant."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Source: `nbytes` of bulk follow."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """Puller: I am done. `read`: it read the pages by itself; `vouch`: it waits for `LeaseReleased`."""

    read: bool
    vouch: bool


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """Source: the pages were pinned until now, and are no more."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Either: no, for the reason that `error` names."""

    error: str
    detail: str


Message = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | LeaseRequest
    | Grant
    | Read
    | Bytes
    | ReleaseLease
    | LeaseReleased
    | Refusal
)
_KINDS: Mapping[str, type[Message]] = {kind.__name__: kind for kind in Message.__args__}
_PLAIN: Mapping[object, tuple[type, ...]] = {
    int: (int,),
    str: (str,),
    bool: (bool,),
    float: (float, int),
    dict[str, str]: (dict,),
    tuple[RemoteRegion, ...]: (tuple,),
}
_FIELDS: Mapping[type, tuple[tuple[str, tuple[type, ...]], ...]] = {
    kind: tuple((one.name, _PLAIN[one.type]) for one in fields(kind)) for kind in Message.__args__
}
_WRITE_JSON = json.JSONEncoder(separators=(",", ":"), default=RemoteRegion.as_json).encode
_READ_JSON = json.JSONDecoder().raw_decode
_REFUSALS: Mapping[str, type[TransportError]] = {
    kind.__name__: kind
    for kind in (
        errors.NotOffered,
        errors.HelloRefused,
        errors.LeaseExpired,
        errors.RegionRefused,
        errors.WireError,
        errors.PathUnavailable,
    )
}


def encode(message: Message) -> bytes:
    """The message's frame."""
    values = {"kind": type(message).__name__}
    values |= {name: getattr(message, name) for name, _ in _FIELDS[type(message)]}
    body = _WRITE_JSON(values).encode()
    assert len(body) <= MOST_FRAME_BYTES, f"a {type(message).__name__} of {len(body)} bytes"
    return LENGTH.pack(len(body)) + body


def body_bytes(length: bytes | bytearray) -> int:
    """How many bytes of JSON follow; WireError for more than a message can have."""
    (nbytes,) = LENGTH.unpack(length)
    if not 2 <= nbytes <= MOST_FRAME_BYTES:
        raise WireError(f"a frame of {nbytes} bytes: not this protocol; check what listens at that address")
    return nbytes


def decode(body: bytes | bytearray) -> Message:
    """The message in a frame's body; WireError for anything that is none."""
    try:
        text = body.decode()
        values, end = _READ_JSON(text)
        if end != len(text):
            raise ValueError("more than one value")
        kind = _KINDS[values.pop("kind")]
        if "regions" in values:
            values["regions"] = tuple(RemoteRegion.from_json(region) for region in values["regions"])
        message = kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RegionRefused) as error:
        raise WireError(f"{bytes(body[:80])!r} is no message: {error}; compare the versions") from error
    for name, allowed in _FIELDS[kind]:
        _check(name, allowed, getattr(message, name))
    return message


def refusal_of(error: TransportError) -> Refusal:
    """What to tell the other end about `error`."""
    name = type(error).__name__
    return Refusal(name if name in _REFUSALS else "WireError", str(error))


def error_of(refusal: Refusal) -> TransportError:
    """The error that the other end names."""
    return _REFUSALS.get(refusal.error, WireError)(refusal.detail)


def _check(name: str, allowed: tuple[type, ...], value: object) -> None:
    strings = not isinstance(value, dict) or all(isinstance(text, str) for text in value.values())
    if type(value) not in allowed or not strings:
        raise WireError(f"{name}={value!r:.80}: {allowed[0].__name__} expected; compare the versions")
    if isinstance(value, int | float) and not 0 <= value < 1 << 63:  # NaN compares false
        raise WireError(f"{name}={value!r:.80}: out of range; compare the versions")
