"""Strangers at a gRPC port: HTTP/2 frames as bytes, with whatever no client library would send."""

import socket
from collections.abc import Sequence
from contextlib import suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _DATA, _RESET, _SETTINGS, _PING, _CONTINUATION = 1, 0, 3, 4, 6, 9
_END_HEADERS = 4
Header = tuple[bytes, bytes]


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """Return one frame."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


SETTINGS = frame(_SETTINGS, 0, 0, b"")


def call(path: bytes, headers: Sequence[Header] = (), stream: int = 1) -> bytes:
    """Return the frame that begins a call."""
    named = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
        (b"content-type", b"application/grpc"), (b"te", b"trailers"), *headers,
    ]  # fmt: skip
    return frame(_HEADERS, _END_HEADERS, stream, b"".join(_literal(*each) for each in named))


def message(content: bytes, announced: int | None = None, stream: int = 1) -> bytes:
    """Return a frame of one message; it may announce another length than it has."""
    length = len(content) if announced is None else announced
    return frame(_DATA, 0, stream, b"\x00" + length.to_bytes(4, "big") + content)


def reset(stream: int) -> bytes:
    """Return the frame that gives a call up."""
    return frame(_RESET, 0, stream, (8).to_bytes(4, "big"))


def pings(count: int) -> bytes:
    """Return so many pings."""
    return frame(_PING, 0, 0, b"x" * 8) * count


def endless_headers(frames: int) -> bytes:
    """Return headers that go on and on, one header a frame, and never end."""
    first = frame(_HEADERS, 0, 1, _literal(b":method", b"POST"))
    return first + b"".join(
        frame(_CONTINUATION, 0, 1, _literal(b"x-%d" % at, b"y" * 1000)) for at in range(frames)
    )


def said_to(port: int, said: bytes, wait_s: float = 0.2) -> bytes:
    """Say something to a port of this machine; return what it answers within a while."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), 5.0) as sock:
        sock.settimeout(wait_s)
        with suppress(OSError):  # a reset ends it like silence
            sock.sendall(said)
            while some := sock.recv(1 << 16):
                heard += some
    return heard


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + _text(name) + _text(value)


def _text(value: bytes) -> bytes:
    """Return a text as HPACK has it (RFC 7541, 5.2), without Huffman's code."""
    length = len(value)
    if length < 127:
        return bytes([length]) + value
    written, length = [127], length - 127
    while length >= 128:
        written.append(length % 128 + 128)
        length //= 128
    return bytes([*written, length]) + value
