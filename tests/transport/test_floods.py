"""Connections that come to nothing keep no peer out, and what was once said truly opens nothing when said again."""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.impostor import SOON_S
from tests.transport.node_setup import Setup
from transport import server
from transport.base import Address
from transport.control.messages import LENGTH
from transport.errors import NotOffered, TransportError


class Recorder:
    """Stands between a puller and a source, and keeps what the puller says."""

    def __init__(self, source: Address) -> None:
        self.said = b""
        self._source = source
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(*self._listener.getsockname())
        self._thread = threading.Thread(target=self._relay)
        self._thread.start()

    def close(self) -> None:
        """Wait until the puller has gone."""
        self._thread.join(SOON_S)

    def _relay(self) -> None:
        host, port = self._source.host, self._source.port
        with (
            self._listener,
            self._listener.accept()[0] as puller,
            socket.create_connection((host, port)) as source,
        ):
            back = threading.Thread(target=_copy, args=(source, puller, lambda _: None))
            back.start()
            _copy(puller, source, self._keep)
            back.join(SOON_S)

    def _keep(self, some: bytes) -> None:
        self.said += some


def _copy(one: socket.socket, other: socket.socket, keep: Callable[[bytes], None]) -> None:
    with suppress(OSError):
        while some := one.recv(1 << 16):
            keep(some)
            other.sendall(some)
        other.shutdown(socket.SHUT_WR)


@asynchronous
async def test_half_open_connections_make_room_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GREETING_S", 0.3)
    source, puller = Setup().open("source"), Setup().open("puller")
    flood = [
        socket.create_connection((source.address.host, source.address.port))
        for _ in range(server.MOST_CONNECTIONS)
    ]
    try:
        for at, sock in enumerate(flood):
            sock.sendall(LENGTH.pack(100)[: at % 4])  # nothing, or the beginning of a frame
        with pytest.raises(NotOffered):  # it was let in, and told what is not here
            await puller.lease(source.address, "not here", SOON_S)
    finally:
        for sock in flood:
            sock.close()
    await asyncio.gather(puller.close(), source.close())


@asynchronous
async def test_what_a_peer_said_before_lets_nobody_in_again() -> None:
    source, puller = Setup().open("source"), Setup().open("puller")
    recorder = Recorder(source.address)
    with pytest.raises(NotOffered):
        await puller.lease(recorder.address, "not here", SOON_S)
    await puller.close()
    await asyncio.to_thread(recorder.close)
    answer = await asyncio.to_thread(_replayed, source.address, recorder.said)
    assert b"wrong token" in answer
    assert b"Welcome" not in answer
    await source.close()


def _replayed(address: Address, said: bytes) -> bytes:
    heard = b""
    with socket.create_connection((address.host, address.port), SOON_S) as sock, suppress(OSError):
        sock.sendall(said)
        while some := sock.recv(1 << 16):
            heard += some
    return heard


@asynchronous
async def test_a_peer_of_another_cluster_is_given_nothing() -> None:
    source, stranger = Setup().open("source"), Setup(token="the token of another one").open("stranger")
    with pytest.raises(TransportError, match="wrong token"):
        await stranger.lease(source.address, "anything", SOON_S)
    await asyncio.gather(stranger.close(), source.close())
