"""Exchange messages between two processes of one machine, over a socket that only they have.

A message is its length (4 bytes, little-endian), then msgpack; bytes in bulk may follow it as they are.
"""

import socket
import struct
from contextlib import suppress

import msgspec

from engine.tensor_parallel.messages import Message

_LENGTH = struct.Struct("<I")


class ChannelClosed(ConnectionError):
    """The process at the other end is gone, or has closed."""


class WorkerChannel:
    """One end of a channel. One thread at a time sends, and one receives."""

    def __init__(self, end: socket.socket) -> None:
        """Take over the socket."""
        self._end = end
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message, bulk: memoryview | None = None) -> None:
        """Send a message, and `bulk` after it. Raises ChannelClosed."""
        content = self._encoder.encode(message)
        try:
            self._end.sendall(_LENGTH.pack(len(content)) + content)
            if bulk is not None:
                self._end.sendall(bulk)
        except OSError as error:
            raise ChannelClosed(f"the other process is gone ({error})") from error

    def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed."""
        header = bytearray(_LENGTH.size)
        self.receive_into(memoryview(header))
        content = bytearray(_LENGTH.unpack(header)[0])
        self.receive_into(memoryview(content))
        return self._decoder.decode(content)

    def receive_into(self, buffer: memoryview) -> None:
        """Wait for bytes in bulk that fill `buffer` ([n] bytes). Raises ChannelClosed."""
        filled = 0
        while filled < len(buffer):
            try:
                count = self._end.recv_into(buffer[filled:])
            except OSError as error:
                raise ChannelClosed(f"the other process is gone ({error})") from error
            if not count:
                raise ChannelClosed("the other process closed the channel")
            filled += count

    def close(self) -> None:
        """Close this end; threads that wait at either end are woken."""
        with suppress(OSError):  # closed already, or the other end is gone: no thread waits
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
