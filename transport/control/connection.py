"""Talk over one control connection, each call until a deadline.

A Connection is the sole owner of its socket; one thread uses it at a time. Bulk bytes go straight between the socket
and the caller's memory, with TLS as without. Any thread may `abort`, which makes the blocked call fail at once.
"""

import select
import socket
import ssl
import struct
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from transport.control.messages import (
    LENGTH,
    MOST_FRAME_BYTES,
    Message,
    Refusal,
    body_bytes,
    decode,
    encode,
    error_of,
)
from transport.errors import PeerGone, PullTimeout, WireError

SEND_BYTES = 1 << 20
UNACKNOWLEDGED_MS = 10_000
AT_ONCE = struct.pack("ii", 1, 0)

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point of the monotonic clock, in seconds."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Return the point `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Return the seconds that remain. Raises TimeoutError when none do, so that no step begins too late."""
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def passed(self) -> bool:
        """Tell if the deadline is over."""
        return time.monotonic() >= self.at_s

    def sooner(self, seconds: float) -> "Deadline":
        """Return the point `seconds` before."""
        return Deadline(self.at_s - seconds)

    def at_most(self, seconds: float) -> "Deadline":
        """Return this deadline, or `seconds` from now if that is sooner."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))


class Connection:
    """A connected socket that carries messages and bulk bytes; `peer` names the other end in errors."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.aborted = False
        self.garbled = False  # part of a message or of a bulk may be on its way: nothing sensible can follow
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A cut link is otherwise noticed after a quarter of an hour.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)

    def send(self, message: Message, deadline: Deadline) -> None:
        """Send one message. Raises PeerGone, PullTimeout."""
        self.send_all((message,), deadline)

    def send_all(self, messages: Iterable[Message], deadline: Deadline) -> None:
        """Send messages in one go. Raises PeerGone, PullTimeout."""
        self.send_bytes(memoryview(b"".join(map(encode, messages))), deadline)

    def send_bytes(self, view: memoryview, deadline: Deadline) -> None:
        """Send all of `view`. Raises PeerGone, PullTimeout."""
        with self._failures():
            for start in range(0, len(view), SEND_BYTES):
                self._socket.settimeout(deadline.left_s())
                self.garbled = True
                self._socket.sendall(view[start : start + SEND_BYTES])
        self.garbled = False

    def receive(self, deadline: Deadline, most_bytes: int = MOST_FRAME_BYTES) -> Message:
        """Return the next message, of at most so many bytes; a refusal is raised as the error that it names.

        Raises PeerGone, PullTimeout, WireError.
        """
        head = bytearray(LENGTH.size)
        self.receive_into(memoryview(head), deadline)
        body = bytearray(body_bytes(head, most_bytes))
        self.receive_into(memoryview(body), deadline)
        message = decode(body)
        if isinstance(message, Refusal):
            raise error_of(message)
        return message

    def expect(self, kind: type[M], deadline: Deadline, most_bytes: int = MOST_FRAME_BYTES) -> M:
        """Return the next message, which must be of `kind`. Raises WireError if it is another."""
        message = self.receive(deadline, most_bytes)
        if not isinstance(message, kind):
            raise WireError(
                f"{self.peer} said {type(message).__name__}, not {kind.__name__}: compare the versions"
            )
        return message

    def receive_into(self, view: memoryview, deadline: Deadline) -> None:
        """Fill all of `view` from the socket. Raises PeerGone, PullTimeout."""
        with self._failures():
            got, wanted = 0, len(view)
            while got < wanted:
                self._socket.settimeout(deadline.left_s())
                count = self._socket.recv_into(view[got:])
                if not count:
                    raise ConnectionError(f"hung up after {got} of {wanted} bytes")
                got += count

    def is_quiet(self) -> bool:
        """Tell if the connection is up and the peer has said nothing: it may be used again."""
        return not self.aborted and not self._poll.poll(0)

    def abort(self) -> None:
        """Make whatever call is blocked, and every later one, fail with PeerGone; the peer's calls fail on `close`."""
        self.aborted = True
        with suppress(OSError):  # not connected any more
            # Without a reset a peer that has filled our window would learn nothing until its own timeout.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            # Past the TLS layer, whose own shutdown may not run beside a read.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back; only the thread that uses the connection may."""
        self.aborted = True
        self._socket.close()

    @contextmanager
    def _failures(self) -> Generator[None]:
        """Raise the socket's errors under names of this package."""
        try:
            yield
        except TimeoutError as error:
            raise PullTimeout(f"{self.peer}: no answer in time; use another source or allow more") from error
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; ValueError: closed beside us
            raise PeerGone(f"{self.peer}: {reason(error)}; use another source") from error


def reason(error: Exception) -> str:
    """Describe an exception in a few words."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error.strerror or error}"
    return str(error) or type(error).__name__
