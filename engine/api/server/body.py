"""Read requests' bodies: in bounded time, in bounded memory over all connections, and decompressed off the event loop.

Nothing of a body is read before its request has passed the guard: until then the client waits, if it asked to.
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http import HttpVersion11

from engine.api.errors import ApiError
from engine.config.http_config import HttpConfig
from engine.waiting.task_pool import TaskPool

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's words for the formats
_RAW_DEFLATE_BITS = -15


class BodyReader:
    """Reads bodies; counts the bytes of all that are held."""

    def __init__(self, config: HttpConfig, pool: TaskPool) -> None:
        """Decompress in `pool`."""
        self._config = config
        self._pool = pool
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: web.Request) -> AsyncGenerator[bytes]:
        """Read a body, which counts as held until the context ends. Raises ApiError."""
        held = _Held(self)
        try:
            yield await self._read(request, held)
        finally:
            self._held_bytes -= held.nbytes

    async def _read(self, request: web.Request, held: "_Held") -> bytes:
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", *_WINDOW_BITS):
            message = (
                f"bodies may come as they are or compressed by {' or '.join(_WINDOW_BITS)}: use one of these"
            )
            raise ApiError(415, message, None, "unsupported_encoding")
        if (request.content_length or 0) > self._config.max_body_bytes:
            raise self._too_large()
        if "Expect" in request.headers and request.version == HttpVersion11:
            await request.writer.write(_CONTINUE)
            request.writer.output_size = 0  # the response has not begun
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                body = await self._receive(request, held)
        except TimeoutError:
            message = (
                f"the request's body did not come within {self._config.body_timeout_s:g} s: send it faster"
            )
            raise ApiError(408, message, None, "timeout") from None
        except web.RequestPayloadError as error:
            raise ApiError(
                400, "the request's body does not end as its headers say", None, "bad_request"
            ) from error
        if encoding == "identity":
            return body
        plain = await self._pool.run(lambda: _decompressed(body, encoding, self._config.max_body_bytes))
        if plain is None:
            raise self._too_large()
        held.add(len(plain))
        return plain

    async def _receive(self, request: web.Request, held: "_Held") -> bytes:
        body = bytearray()
        while chunk := await request.content.readany():
            held.add(len(chunk))
            body += chunk
            if len(body) > self._config.max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def hold(self, nbytes: int) -> None:
        """Count bytes that are held. Raises ApiError if there are too many."""
        if self._held_bytes + nbytes > self._config.max_bodies_bytes:
            message = f"bodies of {self._held_bytes} bytes are being read already: retry in 1 s"
            raise ApiError(503, message, None, "busy", retry_after_s=1)
        self._held_bytes += nbytes

    def _too_large(self) -> ApiError:
        limit = self._config.max_body_bytes
        return ApiError(
            413, f"the request body is over {limit} bytes (--max-body-bytes)", None, "body_too_large"
        )


class _Held:
    """What one body holds of its reader's memory."""

    def __init__(self, reader: BodyReader) -> None:
        self._reader = reader
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        self._reader.hold(nbytes)
        self.nbytes += nbytes


async def wait_with_continue(request: web.Request) -> web.StreamResponse | None:
    """Refuse an expectation other than 100-continue, which is met when the body is read."""
    if request.headers["Expect"].strip().lower() == "100-continue":
        return None
    error = ApiError(417, "Expect: only 100-continue can be met: leave the header out", None, "bad_request")
    response = web.json_response(error.body(), status=error.status)
    response.force_close()
    return response


def _decompressed(body: bytes, encoding: str, most_bytes: int) -> bytes | None:
    """Decompress a whole body; None if it is larger than `most_bytes`. Raises ApiError if it is not sound."""
    bits = _WINDOW_BITS[encoding]
    if encoding == "deflate" and body[:1] and body[0] & 0x0F != 8:
        bits = _RAW_DEFLATE_BITS  # some clients leave the format's header out
    plain = bytearray()
    try:
        while body:
            stream = zlib.decompressobj(bits)
            plain += stream.decompress(body, most_bytes + 1 - len(plain))
            if len(plain) > most_bytes:
                return None
            if not stream.eof:
                raise zlib.error("it ends too soon")
            body = stream.unused_data if encoding == "gzip" else b""  # which may have several members
    except zlib.error as error:
        message = f"the request's body is not {encoding}, as Content-Encoding says ({error})"
        raise ApiError(400, message, None, "bad_request") from None
    return bytes(plain)
