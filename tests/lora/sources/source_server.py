"""An HTTP server of files in a thread of its own, whose faults a test chooses by path."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from aiohttp import web

from lora.sources import file_download

Fault = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


@dataclass
class SourceServer:
    """Serves what lies below `root`. `faults` answer for a file by its path; `asked` are (path, Range) in order."""

    root: Path
    url: str = ""
    has_ranges: bool = True
    has_versions: bool = True
    faults: dict[str, Fault] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, request.headers.get("Range")))
        path = self.root / request.path.lstrip("/")
        if request.path in self.faults:
            return await self.faults[request.path](request, path.read_bytes() if path.is_file() else b"")
        if not path.is_file():
            return web.Response(status=404)
        return await self.whole(request, path.read_bytes())

    async def whole(self, request: web.Request, content: bytes) -> web.StreamResponse:
        """Answer without a fault, as a Fault does."""
        return self.plain(request, content)

    def plain(self, request: web.Request, content: bytes) -> web.Response:
        """Answer as a good server does."""
        version = f'"{hash(content)}"'
        headers = {"ETag": version, "X-Repo-Commit": "0" * 40} if self.has_versions else {}
        if self.has_versions and request.headers.get("If-None-Match") == version:
            return web.Response(status=304, headers=headers)
        wanted = request.headers.get("Range")
        if wanted and self.has_ranges and request.headers.get("If-Range", version) == version:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return web.Response(status=416)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return web.Response(status=206, body=content[start:], headers=headers)
        return web.Response(body=content, headers=headers)

    def ranges_of(self, path: str) -> list[str | None]:
        """List the Range of each question for a file."""
        return [wanted for asked, wanted in self.asked if asked == path]


@contextmanager
def source_server(root: Path) -> Generator[SourceServer]:
    """Serve a folder on a free port of this machine; who fetches from it in this process tries again at once."""
    server, loop = SourceServer(root), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    started = threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        loop.run_until_complete(site.start())
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        with patch.object(file_download, "_PAUSE_S", 0.0):
            yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def cut_after(server: SourceServer, most: int, times: int = 1) -> Fault:
    """Break the connection off after so many bytes of the body, so many times; then answer as a good server does."""
    left = [times]

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        whole = server.plain(request, content)
        if left[0] == 0 or whole.status not in (200, 206):
            return whole
        left[0] -= 1
        body = whole.body
        assert isinstance(body, bytes)
        response = web.StreamResponse(status=whole.status, headers=whole.headers)
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[:most])
        assert request.transport is not None
        request.transport.close()
        return response

    return answer


def endless(first_size: int | None = None) -> Fault:
    """Send bytes without an end, or as many as are not stopped; `first_size` is what is told of their number."""

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"ETag": '"endless"'})
        if first_size is not None:
            response.content_length = first_size
        await response.prepare(request)
        try:
            while True:
                await response.write(b"\0" * 65536)
        except (ConnectionError, asyncio.CancelledError):
            return response

    return answer


def redirect(target: str) -> Fault:
    """Send on to another URL."""

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": target})

    return answer


def status(code: int) -> Fault:
    """Answer with a status alone."""

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        return web.Response(status=code)

    return answer


def trickle() -> Fault:
    """Send a byte now and then, for ever."""

    async def answer(request: web.Request, content: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 1 << 16
        await response.prepare(request)
        try:
            while True:
                await response.write(b"\0")
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.CancelledError):
            return response

    return answer
