"""Connections, from a raw socket: what is slow, broken, too much or half closed costs its own connection only."""

import asyncio
import gzip
import json
import logging
import socket
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from engine.config.http_config import HttpConfig
from tests.engine.api.session import TOKENIZER, ApiSession, session
from tests.fakes.engine_client import FakeClient

COMPLETION = json.dumps({"model": "base", "prompt": "hi"}).encode()
ENOUGH_S = 30


@dataclass
class RawClient:
    """A client that writes what it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), ENOUGH_S)

    async def head(self) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), ENOUGH_S)


@asynccontextmanager
async def connected(api: ApiSession, buffer_bytes: int | None = None) -> AsyncIterator[RawClient]:
    url = api.http._base_url
    assert url is not None
    assert url.host is not None
    sock = socket.socket()
    if buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (url.host, url.port))
    client = RawClient(*await asyncio.open_connection(sock=sock))
    try:
        yield client
    finally:
        client.writer.close()


def post(body: bytes, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", *headers]
    if length is not None or not any("Transfer-Encoding" in header for header in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def parsed(response: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the error of one whole response."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body).get("error", {})


async def alive(api: ApiSession) -> bool:
    return (await api.send("GET", "/health")).status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost"])
async def test_headers_that_do_not_come_end_their_connection(sent: bytes) -> None:
    async with session(config=HttpConfig(header_timeout_s=0.2)) as api, connected(api) as client:
        await client.send(sent)
        answer = await client.rest()
        assert await alive(api)
    assert parsed(answer)[1]["code"] == "timeout" if sent else answer == b""


async def test_a_second_request_s_headers_have_their_time_too() -> None:
    async with session(config=HttpConfig(header_timeout_s=0.2)) as api, connected(api) as client:
        await client.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.head()
        await client.send(b"GET /hea")
        assert b"408" in await client.rest()


async def test_a_body_that_does_not_come_is_told_408() -> None:
    async with session(config=HttpConfig(body_timeout_s=0.2)) as api, connected(api) as client:
        await client.send(post(b"{", length=100))
        status, error = parsed(await client.rest())
        assert (status, error["code"]) == (408, "timeout")


async def test_an_idle_connection_is_closed() -> None:
    async with session(config=HttpConfig(idle_timeout_s=0.2)) as api, connected(api) as client:
        await client.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200 OK" in await client.rest()


async def test_connections_beyond_the_bound_are_told_503_and_take_the_place_of_those_that_leave(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with session(config=HttpConfig(max_connections=2)) as api:
        async with connected(api) as first, connected(api) as second:
            for client in (first, second):
                await client.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                assert b"200 OK" in await client.head()
            for _ in range(30):
                async with connected(api) as third:
                    answer = await third.rest()
                    assert b"Retry-After: 1" in answer
                    assert (parsed(answer)[0], parsed(answer)[1]["code"]) == (503, "busy")
        while True:
            async with connected(api) as client:
                await client.send(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                if b"200 OK" in await client.rest():
                    break
    assert 1 <= sum("connections are open" in record.message for record in caplog.records) <= 10


async def test_bytes_of_bodies_are_bounded_over_all_connections() -> None:
    config = HttpConfig(max_body_bytes=1000, max_bodies_bytes=1500)
    async with session(config=config) as api, connected(api) as first:
        await first.send(post(b"x" * 900, length=1000))
        while (answer := await api.send("POST", "/v1/completions", data=b" " * 900)).status != 503:
            await asyncio.sleep(0.01)
        assert (answer.error["code"], answer.headers["Retry-After"]) == ("busy", "1")
        assert (await api.send("POST", "/v1/completions", data=COMPLETION)).status == 200
        first.writer.close()
        while (await api.send("POST", "/v1/completions", data=b" " * 900)).status == 503:
            await asyncio.sleep(0.01)


async def test_a_declared_length_beyond_the_limit_is_refused_before_the_body() -> None:
    async with session(config=HttpConfig(max_body_bytes=1000)) as api, connected(api) as client:
        await client.send(post(b"", length=1001))
        assert b" 413 " in await client.head()


async def test_a_client_that_waits_to_be_told_is_told_only_after_the_key_was_checked() -> None:
    async with session(api_key="sesame") as api:
        for key, answer in (("wrong", b"HTTP/1.1 401 "), ("sesame", b"HTTP/1.1 100 ")):
            async with connected(api) as client:
                headers = ("Expect: 100-continue", f"Authorization: Bearer {key}")
                await client.send(post(b"", *headers, length=len(COMPLETION)))
                assert (await client.head()).startswith(answer)
                if key == "sesame":
                    await client.send(COMPLETION)
                    assert (await client.head()).startswith(b"HTTP/1.1 200 ")
        async with connected(api) as client:
            await client.send(post(b"", "Expect: miracles", length=2))
            assert (await client.head()).startswith(b"HTTP/1.1 417 ")


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(COMPLETION, mtime=0)),
        ("gzip", gzip.compress(COMPLETION[:9], mtime=0) + gzip.compress(COMPLETION[9:], mtime=0)),
        ("GZIP", gzip.compress(COMPLETION, mtime=0)),
        ("deflate", zlib.compress(COMPLETION)),
        ("deflate", zlib.compress(COMPLETION, wbits=-15)),
        ("identity", COMPLETION),
    ],
)
async def test_compressed_bodies_are_read(encoding: str, body: bytes) -> None:
    async with session() as api:
        headers = {"Content-Encoding": encoding}
        assert (await api.send("POST", "/v1/completions", data=body, headers=headers)).status == 200


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", COMPLETION, 400),
        ("gzip", gzip.compress(COMPLETION, mtime=0)[:-9], 400),
        ("deflate", COMPLETION, 400),
        ("gzip", gzip.compress(b" " * 2_000_000, mtime=0), 413),
        ("gzip", gzip.compress(b" " * 600_000, mtime=0) * 2, 413),
        ("deflate", zlib.compress(b" " * 2_000_000), 413),
        ("br", COMPLETION, 415),
        ("zstd", COMPLETION, 415),
        ("gzip, gzip", COMPLETION, 415),
    ],
)
async def test_bodies_that_are_not_what_their_label_says_are_refused(
    encoding: str, body: bytes, status: int
) -> None:
    async with session(config=HttpConfig(max_body_bytes=1_000_000)) as api:
        headers = {"Content-Encoding": encoding}
        answer = await api.send("POST", "/v1/completions", data=body, headers=headers)
        assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
        assert await alive(api)


BROKEN = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no method": b"NONSENSE\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "length and chunks": post(b"0\r\n\r\n", "Transfer-Encoding: chunked", length=5),
    "a length that is none": b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "a bad header": b"GET /health HTTP/1.1\r\nHost: a\r\nb\x00d: 1\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    "a long line": b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 1000 + b"\r\n",
    "a bad chunk": post(b"nonsense\r\n{}\r\n", "Transfer-Encoding: chunked"),
    "a bad first chunk's end": post(b"2\r\n{}xx0\r\n\r\n", "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
async def test_what_is_no_request_gets_openai_s_error_body_and_no_traceback(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with session() as api, connected(api) as client:
        await client.send(sent)
        status, error = parsed(await client.rest())
        assert status in (400, 431)
        assert (error["type"], set(error)) == ("invalid_request_error", {"message", "type", "param", "code"})
        assert await alive(api)
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


async def test_a_scan_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with session() as api:
        for _ in range(50):
            async with connected(api) as client:
                await client.send(b"\x00\xff\x1b[31m" * 1000 + b"\r\n\r\n")
                await client.rest()
    refused = [record.message for record in caplog.records if "was refused" in record.message]
    assert 1 <= len(refused) <= 10
    assert all(len(line) < 500 and line.isprintable() and line.isascii() for line in refused)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_closes_only_its_own_side_gets_its_response(stream: bool) -> None:
    async with session() as api, connected(api) as client:
        api.engine.gate.clear()
        await client.send(post(json.dumps({"model": "base", "prompt": "hi", "stream": stream}).encode()))
        client.writer.write_eof()
        await api.engine.gate_reached.wait()
        assert (await client.head()).startswith(b"HTTP/1.1 100 ")
        api.engine.gate.set()
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert (b"[DONE]" if stream else b"base heard hi") in answer


async def test_a_client_that_closes_altogether_frees_what_it_asked_for() -> None:
    async with session() as api:
        api.engine.gate.clear()
        async with connected(api) as client:
            await client.send(post(COMPLETION))
            await api.engine.gate_reached.wait()
        await asyncio.wait_for(api.engine.abort_seen.wait(), ENOUGH_S)
        assert api.engine.live == {}


@pytest.mark.parametrize("sent", [b"", b"GET /heal", post(b"{", length=10)])
async def test_a_client_that_closes_its_side_without_a_whole_request_is_let_go(sent: bytes) -> None:
    async with session() as api, connected(api) as client:
        await client.send(sent)
        client.writer.write_eof()
        assert await client.rest() == b""


async def test_a_client_that_takes_nothing_is_hung_up_on() -> None:
    engine = FakeClient(TOKENIZER)
    engine.max_model_len = 1 << 30
    engine.says = lambda model, prompt: "x" * 8_000
    async with session(engine, config=HttpConfig(write_timeout_s=0.3)) as api, connected(api, 4096) as client:
        # Nobody reads: what the client's side takes ends with its buffers.
        body = {"model": "base", "prompt": "hi", "stream": True, "max_tokens": 8_000, "logprobs": 20}
        await client.send(post(json.dumps(body).encode()))
        await asyncio.wait_for(api.engine.abort_seen.wait(), ENOUGH_S)
        assert await alive(api)


async def test_a_client_that_leaves_before_the_headers_of_its_stream_logs_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with session() as api:
        api.engine.gate.clear()
        async with connected(api) as client:
            sock = client.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await client.send(post(json.dumps({"model": "base", "prompt": "hi", "stream": True}).encode()))
            await api.engine.gate_reached.wait()
            api.engine.gate.set()
        while api.engine.live:
            await asyncio.sleep(0.01)
        assert await alive(api)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_head_answers_without_a_body() -> None:
    async with session() as api:
        for path in ("/health", "/metrics", "/version"):
            answer = await api.send("HEAD", path)
            assert (answer.status, answer.body) == (200, b"")
