"""Bound what one client's connection may cost: in time before its headers, while it idles and while it reads.

What the HTTP library refuses by itself is told in OpenAI's error body, and in one bounded line of the log. A client
that has closed only its own side of the connection still gets its response.
"""

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import cast

import msgspec
from aiohttp import http_exceptions, web
from aiohttp.http import HttpVersion11

from engine.api.errors import ApiError
from engine.api.guard import Handler, json_response
from engine.api.server.rate_limited_log import RateLimitedLog, printable
from engine.config.http_config import HttpConfig

_LINGER_S = 5.0  # for the rest of a body that nobody wants, so that its sender sees the response
_AFTER_EOF_S = 0.02  # for a request that came with the end of its connection to be begun
_LOOK_S = 0.2  # how often it is looked whether a client that has closed its side has left altogether
_LOOKS_A_WORD = 25  # how many of these looks there are for each word that it is told
_LEAST_TAKEN_BYTES = 16 << 10  # of a response, within the write timeout
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_log = logging.getLogger(__name__)


class ConnectionLimit:
    """How many connections are open, of at most `most`. Used on one event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0
        self._full = RateLimitedLog(_log, logging.WARNING)
        self.refused = RateLimitedLog(_log)

    def enter(self) -> bool:
        """Count one more connection; False if there are too many."""
        if self._open >= self._most:
            self._full.line(f"{self._open} connections are open (--max-connections): one more was told 503")
            return False
        self._open += 1
        return True

    def leave(self) -> None:
        """Count one connection fewer."""
        self._open -= 1


class HttpConnection(web.RequestHandler):
    """A client's connection: the library's protocol with bounds on what it waits for."""

    def __init__(self, server: web.Server, config: HttpConfig, limit: ConnectionLimit) -> None:
        """Serve what `server` serves."""
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=config.idle_timeout_s,
            lingering_time=_LINGER_S,
            access_log=cast(logging.Logger, None),  # the library's own way to say none
            auto_decompress=False,
            logger=_log,
        )
        self._header_timeout_s, self._write_timeout_s = config.header_timeout_s, config.write_timeout_s
        self._limit = limit
        self._entered = False
        self._answering: web.BaseRequest | None = None
        self._has_begun = False  # to send a request's headers
        self._half_closed = False
        self._headers_due: asyncio.TimerHandle | None = None
        self._write_due: asyncio.TimerHandle | None = None
        self._look_due: asyncio.TimerHandle | None = None
        self._taken_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or turn the client away if there are too many."""
        assert isinstance(transport, asyncio.Transport)
        self._entered = self._limit.enter()
        if not self._entered:
            transport.write(_raw_response(_TOO_MANY))
            transport.close()
            return
        super().connection_made(transport)
        # So that writing is paused, and timed, whenever the client has not taken everything.
        transport.set_write_buffer_limits(high=0)
        self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End; a handler that runs is cancelled."""
        if not self._entered:
            return
        self._limit.leave()
        for timer in (self._headers_due, self._write_due, self._look_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first of a request begin the time for its headers."""
        if not self._entered:
            return
        if self._answering is None:
            self._has_begun = True
            if self._headers_due is None:
                self._expect_headers()
        super().data_received(data)

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - asyncio's, not the library's
        """Keep the connection for a while: the client may have closed only its own side of it. TLS knows no such."""
        if self.ssl_context is not None or not self._entered:
            return False
        self._half_closed = True
        self._look_due = self._loop.call_later(_AFTER_EOF_S, self._look, 0)
        return True

    def pause_writing(self) -> None:
        """Begin the time for the client to take something."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """End that time: the client has taken everything."""
        if self._write_due is not None:
            self._write_due.cancel()
        super().resume_writing()

    def begin(self, request: web.BaseRequest) -> None:
        """Note that a request's headers are here, and its response is being made."""
        self._answering = request
        self._has_begun = False
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    async def start(self) -> None:
        """Answer requests, one after another; end at a target whose host the library cannot read."""
        try:
            await super().start()
        except ValueError as error:  # from making a request of its headers, before anything can answer it
            refused = _refusal(error, str(error))
            self._limit.refused.line(f"a request was refused: {refused.message}")
            if self.transport is not None:
                self.transport.write(_raw_response(refused))
            self.force_close()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the rest of a response, and end the connection if no other request can follow."""
        if isinstance(resp, web.HTTPException):
            resp = _closing_response(ApiError(resp.status, resp.reason))
        if resp.status == HTTPStatus.REQUEST_TIMEOUT or _waits_to_send(request):
            resp.force_close()
            request.content.feed_eof()  # nothing more of its body is waited for
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answering = None
            if self._half_closed:
                self.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no request, or what no handler has answered."""
        if request.writer.output_size > 0:
            raise ConnectionError("a response was begun already")
        if status >= 500:
            _log.error("a request from %s failed in a way that nobody foresaw", request.remote, exc_info=exc)
            return _closing_response(
                ApiError(500, "the server failed; its log has the cause", None, "internal_error")
            )
        error = _refusal(exc, message)
        self._limit.refused.line(f"a request from {request.remote} was refused: {error.message}")
        return _closing_response(error)

    def _expect_headers(self) -> None:
        self._headers_due = self._loop.call_later(self._header_timeout_s, self._headers_late)

    def _headers_late(self) -> None:
        self._headers_due = None
        if self._answering is None and self.transport is not None:
            if self._has_begun:
                self.transport.write(_raw_response(_HEADERS_LATE))
            self.force_close()

    def _expect_reading(self) -> None:
        self._taken_bytes = self._taken()
        self._write_due = self._loop.call_later(self._write_timeout_s, self._reading_late)

    def _reading_late(self) -> None:
        if self._taken() >= self._taken_bytes + _LEAST_TAKEN_BYTES:
            self._expect_reading()
        elif self.transport is not None:
            self._limit.refused.line(f"a client took nothing for {self._write_timeout_s:g} s: hung up on it")
            self.transport.abort()

    def _taken(self) -> int:
        """Count the bytes of the response that the client's side has taken."""
        if self._answering is None or self.transport is None:
            return 0
        return self._answering.writer.output_size - self.transport.get_write_buffer_size()

    def _look(self, looks: int) -> None:
        """Wait on while a whole request's response has not begun and its client is there; else close.

        A client that has left answers what is written to it with a reset; a response that begins meanwhile finds out.
        """
        request, transport = self._answering, self.transport
        if transport is None:
            return
        is_whole = request is not None and request.version >= HttpVersion11 and request.content.is_eof()
        if request is None or not is_whole or request.writer.output_size > 0:
            if not looks:
                transport.close()
            return
        sock: socket.socket = transport.get_extra_info("socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            transport.abort()
            return
        if looks % _LOOKS_A_WORD == 0:
            transport.write(_CONTINUE)  # which every client passes over
        self._look_due = self._loop.call_later(_LOOK_S, self._look, looks + 1)


@web.middleware
async def note_beginning(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell a request's connection that its headers are here."""
    if isinstance(request.protocol, HttpConnection):
        request.protocol.begin(request)
    return await handler(request)


def _waits_to_send(request: web.BaseRequest) -> bool:
    """Tell whether a client waits with its body for a word that it never gets."""
    return "Expect" in request.headers and not request.content.is_eof()


def _refusal(exc: BaseException | None, message: str | None) -> ApiError:
    """Express in OpenAI's words why something is no HTTP request."""
    if isinstance(exc, http_exceptions.LineTooLong):
        return ApiError(431, "the request's line or one of its headers is too long", None, "header_too_long")
    lines = (message or "").split("\n")
    reason = printable(" ".join(line.strip() for line in lines if line.strip(" ^\r")))
    return ApiError(400, f"this is no valid HTTP request: {reason}", None, "bad_request")


def _closing_response(error: ApiError) -> web.Response:
    response = json_response(error.body(), error.status)
    response.force_close()
    return response


def _raw_response(error: ApiError) -> bytes:
    """Write a whole response for a client of whom no request was read."""
    body = msgspec.json.encode(error.body())
    reason = HTTPStatus(error.status).phrase
    retry = f"Retry-After: {error.retry_after_s}\r\n" if error.retry_after_s else ""
    head = (
        f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\n{retry}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


_TOO_MANY = ApiError(503, "too many connections are open: retry in 1 s", None, "busy", retry_after_s=1)
_HEADERS_LATE = ApiError(
    408, "the request's headers did not come in time: send them at once", None, "timeout"
)
