"""Define what two nodes may say to each other over the control connection, and how it looks on the wire.

A frame is four bytes of length, big-endian, and that many bytes of JSON: plain names and numbers, never pickle.
msgspec refuses whatever is not exactly one message, before anybody sees it. Bulk bytes follow a `Bytes` message,
unframed.
"""

import struct
from collections.abc import Mapping
from typing import Annotated

import msgspec

from transport import errors
from transport.base import MOST_INT, Count, RemoteRegion
from transport.errors import TransportError, WireError

VERSION = 3
LENGTH = struct.Struct(">I")
MOST_FRAME_BYTES = 1 << 20
MOST_STRANGER_BYTES = 4096  # of a frame from whom nobody knows yet
_MOST_TEXT = 300

Seconds = Annotated[float, msgspec.Meta(ge=0, lt=float(MOST_INT))]


class _Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag=True):
    """What all messages have in common: a field `kind` that holds the class's name, and no unknown fields."""


class Hello(_Frame, frozen=True):
    """Puller, first: who it is, and a number that the source has to prove its token with."""

    version: Count
    node: str
    nonce: str


class Challenge(_Frame, frozen=True):
    """Source: who it is, its own proof, and a number for the puller's."""

    version: Count
    node: str
    nonce: str
    proof: str


class Proof(_Frame, frozen=True):
    """Puller: that it has the token too."""

    proof: str


class Welcome(_Frame, frozen=True):
    """Source: the data paths it offers, and of each the capabilities by which a puller knows if it can use it."""

    capabilities: dict[str, str]


class LeaseRequest(_Frame, frozen=True):
    """Puller: pin `name` for `hold_s`; the bytes will be read through `path`."""

    name: str
    hold_s: Seconds
    path: str


class Grant(_Frame, frozen=True):
    """Source: pinned. `metadata` is what the path needs to read the regions; empty if the puller has it already."""

    ticket: Count
    hold_s: Seconds
    metadata: str
    regions: tuple[RemoteRegion, ...]


class Read(_Frame, frozen=True):
    """Puller: send me the bytes of the lease, which ends it. It need not wait for the grant."""


class Bytes(_Frame, frozen=True):
    """Source: `nbytes` of bulk follow."""

    nbytes: Count


class ReleaseLease(_Frame, frozen=True):
    """Puller: I am done. `read`: it read the pages by itself; `confirm`: it waits for `LeaseReleased`."""

    read: bool
    confirm: bool


class LeaseReleased(_Frame, frozen=True):
    """Source: the pages were pinned until now, and are no more."""


class Refusal(_Frame, frozen=True):
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
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Message)
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
    """Write the message as a frame."""
    body = _ENCODER.encode(message)
    assert len(body) <= MOST_FRAME_BYTES, f"a {type(message).__name__} of {len(body)} bytes"
    return LENGTH.pack(len(body)) + body


def body_bytes(length: bytes | bytearray, most: int = MOST_FRAME_BYTES) -> int:
    """Return how many bytes of JSON follow. Raises WireError for more than a message may have."""
    (nbytes,) = LENGTH.unpack(length)
    if not 2 <= nbytes <= most:
        raise WireError(f"a frame of {nbytes} bytes: not this protocol; check what listens at that address")
    return nbytes


def decode(body: bytes | bytearray) -> Message:
    """Read the message in a frame's body. Raises WireError for anything that is none."""
    try:
        if not (body.startswith(b"{") and body.endswith(b"}")):  # msgspec would allow spaces around it
            raise msgspec.DecodeError("one JSON object expected")
        message = _DECODER.decode(body)
        if b"\\u" in body:  # half a surrogate pair can be escaped, and is no text that can be sent or hashed
            _ENCODER.encode(message)
        return message
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        told = printable(str(error))
        raise WireError(f"{bytes(body[:80])!r} is no message: {told}; compare the versions") from error


def refusal_of(error: TransportError) -> Refusal:
    """Tell the other end about `error`."""
    name = type(error).__name__
    return Refusal(name if name in _REFUSALS else "WireError", printable(str(error)))


def error_of(refusal: Refusal) -> TransportError:
    """Return the error that the other end names."""
    return _REFUSALS.get(refusal.error, WireError)(printable(refusal.detail))


def printable(text: str) -> str:
    """Return a text that another node wrote, or may have a part in, as a log may hold it: short, and of one line."""
    start = text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in start)
