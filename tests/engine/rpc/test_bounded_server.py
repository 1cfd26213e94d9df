"""What strangers say to a gRPC port stops nothing, fills nothing, and leaves few lines in the log."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from engine.rpc.bounded_server import BoundedServer, RpcBounds, RpcService
from scripts.certificates import make_certificates
from tests.engine.rpc.raw_http2 import (
    PREFACE,
    SETTINGS,
    call,
    endless_headers,
    message,
    pings,
    reset,
    said_to,
)

PATH = "/test.Echo/Repeat"
BOUNDS = RpcBounds(connections=8, handshake_s=0.3, idle_s=0.3, message_bytes=1 << 20)
OPEN = PREFACE + SETTINGS
METHOD = PATH.encode()
NO_UTF8 = b"/test.Echo/\xff\xfe\x80"
SAID = {
    "noise": os.urandom(500),
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that is no UTF-8": OPEN + call(NO_UTF8),
    "a path that is no UTF-8, again and again": OPEN
    + b"".join(call(NO_UTF8, stream=2 * at + 1) for at in range(50)),
    "a path with control characters": OPEN + call(b"/\x00\n\x1b[31m"),
    "no path": OPEN + call(b""),
    "a long path": OPEN + call(b"/" + b"x" * 8000),
    "another method": OPEN + call(b"/test.Echo/Other"),
    "a header that is no UTF-8": OPEN + call(METHOD, [(b"x-name", b"\xff\xfe")]),
    "a header of control characters": OPEN + call(METHOD, [(b"x-name", b"a\r\n2026 CRITICAL \x1b[31m")]),
    "long headers": OPEN + call(METHOD, [(b"x-%d" % at, b"y" * 500) for at in range(25)]),
    "headers that never end": OPEN + endless_headers(200),
    "a deadline that is none": OPEN + call(METHOD, [(b"grpc-timeout", b"\xff9999999999S")]),
    "an encoding that nobody knows": OPEN + call(METHOD, [(b"grpc-encoding", b"\xff")]),
    "a message of a GiB": OPEN + call(METHOD) + message(b"x" * 100, 1 << 30),
    "a message without a call": OPEN + message(b"x"),
    "calls that are given up": OPEN
    + b"".join(call(METHOD, stream=2 * at + 1) + reset(2 * at + 1) for at in range(200)),
    "pings": OPEN + pings(2000),
}  # fmt: skip


@dataclass(slots=True)
class Echo:
    """A server that says again what it hears, and a stream to it."""

    port: int
    stream: Any

    async def answers(self) -> bool:
        """Tell whether the stream is still answered, and a new one too."""
        await self.stream.write(b"still here")
        async with asyncio.timeout(60):
            return await self.stream.read() == b"still here" and await self.takes_a_new_one()

    async def takes_a_new_one(self) -> bool:
        """Tell whether a new connection is answered, sooner or later."""
        async with asyncio.timeout(60):
            while True:
                try:
                    async with _channel(self.port) as channel:
                        stream = channel.stream_stream(PATH)(timeout=20)
                        await stream.write(b"new")
                        return await stream.read() == b"new"
                except grpc.RpcError:
                    await asyncio.sleep(0.05)


def _channel(port: int) -> Any:
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)


async def _repeat(_: object, context: Any) -> None:
    while isinstance(heard := await context.read(), bytes):
        await context.write(heard)


@asynccontextmanager
async def echo(bounds: RpcBounds = BOUNDS) -> AsyncIterator[Echo]:
    """Serve, with one stream open."""
    handler = cast(Any, grpc).stream_stream_rpc_method_handler(_repeat)
    server = BoundedServer(bounds)
    server.add(RpcService("test.Echo", {"Repeat": handler}))
    port = server.server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with _channel(port) as channel:
        stream = channel.stream_stream(PATH)()
        try:
            yield Echo(port, stream)
        finally:
            stream.cancel()
            await server.stop(0.0)


@pytest.mark.parametrize("said", SAID.values(), ids=SAID.keys())
def test_whatever_a_stranger_says_the_others_are_answered(
    said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with echo() as served:
            assert await served.answers()
            for _ in range(3):
                await asyncio.to_thread(said_to, served.port, said)
            assert await served.answers()

    asyncio.run(scenario())
    lines = [record for record in caplog.records if record.name != "asyncio"]
    assert len(lines) <= 12
    assert all(len(line.getMessage()) < 500 and line.getMessage().isprintable() for line in lines)
    assert not any(line.exc_info for line in lines)


def test_a_method_that_is_not_there_is_told_so() -> None:
    async def scenario() -> None:
        async with echo() as served, _channel(served.port) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/test.Echo/Other")(b"")
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())


@pytest.mark.parametrize("said", [b"", PREFACE[:10], OPEN], ids=["nothing", "half a preface", "a preface"])
def test_connections_of_which_nothing_comes_make_room_for_others(said: bytes) -> None:
    async def scenario() -> None:
        async with echo() as served:
            assert await served.answers()
            flood = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(60)]
            try:
                for sock in flood:
                    sock.sendall(said)
                assert await served.answers()
            finally:
                for sock in flood:
                    sock.close()

    asyncio.run(scenario())


def test_no_more_connections_are_held_than_are_allowed() -> None:
    async def scenario() -> None:
        async with echo(RpcBounds(8, 60.0, 60.0, 1 << 20)) as served:
            flood = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
            is_closed = await asyncio.gather(*(asyncio.to_thread(_is_closed, sock) for sock in flood))
            assert sum(is_closed) >= 32

    asyncio.run(scenario())


def _is_closed(sock: socket.socket) -> bool:
    with sock:
        sock.settimeout(1.0)
        try:
            sock.sendall(OPEN)
            while sock.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True


_FAILED_HANDSHAKES = """
import asyncio, socket, sys
from pathlib import Path
from engine.cluster.trusted_channels import MemberServer
from transport.base import Address
from transport.control.security import Security, TlsFiles

async def main():
    server = MemberServer(Security("a token of sixteen", TlsFiles(*map(Path, sys.argv[1:]))), [])
    address = await server.start(Address("127.0.0.1", 0))
    for _ in range(15):
        with socket.create_connection((address.host, address.port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            await asyncio.sleep(0.05)
    await server.close()

asyncio.run(main())
"""


def test_failed_handshakes_write_nothing_to_standard_error(tmp_path: Path) -> None:
    files = make_certificates(tmp_path, ["127.0.0.1"])
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", _FAILED_HANDSHAKES, *files]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
