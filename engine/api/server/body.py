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
_PIECE_BYTES = 1 << 18


class BodyReader:
    """Reads bodies; counts the bytes of all that are held."""

    def __init__(self, config: HttpConfig, pool: TaskPool) -> None:
        """Decompress in `pool`."""
        self._config = config
        self._pool = pool
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: web.Request, most_bytes: int | None = None) -> AsyncGenerator[bytearray]:
        """Read a body, which counts as held until the context ends. Raises ApiError.

        It may have as many bytes as any other, or `most_bytes` if that is less.
        """
        held = _Held(self, self._config.max_body_bytes, " (--max-body-bytes)")
        if most_bytes is not None and most_bytes < held.most:
            held = _Held(self, most_bytes, "")
        try:
            yield await self._read(request, held)
        finally:
            self._held_bytes -= held.nbytes

    async def _read(self, request: web.Request, held: "_Held") -> bytearray:
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", *_WINDOW_BITS):
            message = (
                f"bodies may come as they are or compressed by {' or '.join(_WINDOW_BITS)}: use one of these"
            )
            raise ApiError(415, message, None, "unsupported_encoding")
        if (request.content_length or 0) > held.most:
            raise held.too_large()
        await let_come(request)
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
        plain = await self._pool.run(lambda: _decompressed(body, encoding, held.most))
        if plain is None:
            raise held.too_large()
        held.add(len(plain))
        return plain

    async def _receive(self, request: web.Request, held: "_Held") -> bytearray:
        body = bytearray()
        while chunk := await request.content.readany():
            held.add(len(chunk))
            body += chunk
            if len(body) > held.most:
                raise held.too_large()
        return body

    def hold(self, nbytes: int) -> None:
        """Count bytes that are held. Raises ApiError if there are too many."""
        if self._held_bytes + nbytes > self._config.max_bodies_bytes:
            message = f"bodies of {self._held_bytes} bytes are being read already: retry in 1 s"
            raise ApiError(503, message, None, "busy", retry_after_s=1)
        self._held_bytes += nbytes


class _Held:
    """What one body holds of its reader's memory, and how many bytes it may have."""

    def __init__(self, reader: BodyReader, most: int, option: str) -> None:
        self._reader, self._option = reader, option
        self.most, self.nbytes = most, 0

    def too_large(self) -> ApiError:
        """Make the error for a body of more bytes."""
        message = f"the request body is over {self.most} bytes{self._option}"
        return ApiError(413, message, None, "body_too_large")

    def add(self, nbytes: int) -> None:
        self._reader.hold(nbytes)
        self.nbytes += nbytes


async def let_come(request: web.Request) -> None:
    """Tell a client that waits for it to send the body."""
    if "Expect" in request.headers and request.version == HttpVersion11:
        await request.writer.write(_CONTINUE)
        request.writer.output_size = 0  # the response has not begun


async def wait_with_continue(request: web.Request) -> web.StreamResponse | None:
    """Refuse an expectation other than 100-continue, which is met when the body is read."""
    if request.headers["Expect"].strip().lower() == "100-continue":
        return None
    error = ApiError(417, "Expect: only 100-continue can be met: leave the header out", None, "bad_request")
    response = web.json_response(error.body(), status=error.status)
    response.force_close()
    return response


def _decompressed(body: bytearray, encoding: str, most_bytes: int) -> bytearray | None:
    """Decompress a whole body, a piece at a time, so that other threads go on meanwhile.

    Returns None if it is larger than `most_bytes`. Raises ApiError if it is not sound.
    """
    bits = _WINDOW_BITS[encoding]
    if encoding == "deflate" and body[:1] and body[0] & 0x0F != 8:
        bits = _RAW_DEFLATE_BITS  # some clients leave the format's header out
    plain, stream = bytearray(), zlib.decompressobj(bits)
    try:
        for start in range(0, len(body), _PIECE_BYTES):
            rest, has_more = bytes(body[start : start + _PIECE_BYTES]), False
            while rest or (has_more and not stream.eof):
                if stream.eof:
                    if encoding != "gzip":  # which may have several members
                        break
                    stream = zlib.decompressobj(bits)
                piece = stream.decompress(rest, _PIECE_BYTES)
                plain += piece
                if len(plain) > most_bytes:
                    return None
                rest = stream.unused_data if stream.eof else stream.unconsumed_tail
                has_more = len(piece) == _PIECE_BYTES
        if body and not stream.eof:
            raise zlib.error("it ends too soon")
    except zlib.error as error:
        message = f"the request's body is not {encoding}, as Content-Encoding says ({error})"
        raise ApiError(400, message, None, "bad_request") from None
    return plain
