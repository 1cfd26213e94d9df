"""Request targets, from a raw socket: what names nothing is refused in OpenAI's words, and told of in a short line."""

import json
import logging
from pathlib import Path

import pytest

from engine.metrics.request_log import RequestLog
from tests.engine.api.session import ApiSession, session
from tests.engine.api.test_connections import alive, connected, parsed

NO_REQUESTS = {
    "bytes that are no UTF-8": b"/v1/models/\xff\xfe",
    "raw UTF-8": "/v1/models/é".encode(),
    "a raw surrogate": b"/\xed\xa0\x80",
    "a control character": b"/a\x01b",
    "an escape": b"/\x1b[31m",
    "a tab": b"/a\tb",
    "a null": b"/a\x00b",
    "a space": b"/a b",
    "no slash": b"health",
    "nothing": b"",
    "an asterisk": b"*",
    "an authority": b"a:443",
    "no host": b"http:///health",
    "a port that is none": b"http://a:99999/health",
    "a host that is none": b"http://[::1/health",
    "a host that no name can be": b"http://xn--a/health",
}
NOTHING_THERE = {
    "quoted bytes that are no UTF-8": b"/v1/models/%ff%fe",
    "a quoted null": b"/v1/models/%00",
    "a quoted line end": b"/v1/models/%0aforged",
    "a quoted surrogate": b"/v1/models/%ed%a0%80",
    "a quote of nothing": b"/%zz",
    "a folder above": b"/../../etc/passwd",
    "two slashes": b"//health",
    "another scheme": b"ftp://a/b",
    "a long path": b"/" + b"x" * 8000,
    "a long name": b"/v1/models/" + b"x" * 8000,
    "a long quoted name": b"/v1/models/" + b"%ff" * 2500,
}


async def answer(api: ApiSession, target: bytes, method: bytes = b"GET") -> bytes:
    async with connected(api) as client:
        await client.send(method + b" " + target + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return await client.rest()


@pytest.mark.parametrize("target", NO_REQUESTS.values(), ids=NO_REQUESTS.keys())
async def test_a_target_that_none_can_be_is_a_400(target: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with session() as api:
        status, error = parsed(await answer(api, target))
        assert (status, error["code"]) == (400, "bad_request")
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 400
        assert await alive(api)
    told = [record for record in caplog.records if record.name.startswith("engine")]
    assert len(told) == 1
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.WARNING]
    assert all(len(line.message) < 500 and line.message.isascii() for line in told)
    assert all(line.message.isprintable() for line in told)


@pytest.mark.parametrize("target", NOTHING_THERE.values(), ids=NOTHING_THERE.keys())
async def test_a_target_that_names_nothing_is_a_404_and_a_short_line(target: bytes, tmp_path: Path) -> None:
    file = tmp_path / "access"
    async with session(log=RequestLog(access="json", access_file=file)) as api:
        status, error = parsed(await answer(api, target))
        assert status == 404
        assert error["code"] in ("unknown_url", "model_not_found")
        assert len(error["message"]) < 300
        assert await alive(api)
    lines = file.read_bytes().decode("ascii").splitlines()
    assert [json.loads(line)["status"] for line in lines] == [404, 200]
    assert all(len(line) < 600 and line.isprintable() for line in lines)


@pytest.mark.parametrize("target", [b"http://a/health", b"http://[::1]:80/health", b"https://u:p@a/health"])
async def test_an_absolute_target_is_taken_as_every_server_must(target: bytes) -> None:
    async with session() as api:
        assert (await answer(api, target)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("method", "target"), [(b"OPTIONS", b"*"), (b"CONNECT", b"a:443")])
async def test_what_only_a_proxy_could_do_is_refused(method: bytes, target: bytes) -> None:
    async with session() as api:
        status, error = parsed(await answer(api, target, method))
        assert (status, error["code"]) == (404, "unknown_url")
