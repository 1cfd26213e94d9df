"""Make gRPC servers that a stranger can neither stop nor fill, whatever bytes come before a call's token is known.

grpc.aio stops serving for good when a call's path is no UTF-8, and logs a traceback for each header that is none. It
bounds neither connections nor how long one may lie idle. So its loop is handed only calls of the registered methods,
whose paths it need not read. All others are turned away here.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio
from grpc._cython import cygrpc  # pyright: ignore[reportMissingTypeStubs]
from grpc.aio._server import Server  # pyright: ignore[reportMissingTypeStubs]

from engine.api.server.rate_limited_log import RateLimitedLog

_PAUSE_S = 0.1  # before calls are accepted again where accepting failed
_MOST_MS = 2**31 - 1
_LIBRARY_LOG = "grpc._cython.cygrpc"
_NO_TEXT = "Invalid encoding on"  # what it says of a header that is no UTF-8
_log = logging.getLogger(__name__)
_cygrpc = cast(Any, cygrpc)
Options = Sequence[tuple[str, int]]


def milliseconds(seconds: float) -> int:
    """Return a time as gRPC takes it."""
    return max(1, min(_MOST_MS, int(1000 * seconds)))


@dataclass(frozen=True, slots=True)
class RpcService:
    """A service by its name, with a handler for each of its methods."""

    name: str
    methods: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RpcBounds:
    """What connections may cost a server: how many there are, and for how long one says or asks nothing.

    A message's length is its decompressed one.
    """

    connections: int
    handshake_s: float
    idle_s: float
    message_bytes: int

    def options(self) -> list[tuple[str, int]]:
        """Return the bounds in the library's words."""
        return [
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.server_handshake_timeout_ms", milliseconds(self.handshake_s)),
            ("grpc.max_connection_idle_ms", milliseconds(self.idle_s)),
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.so_reuseport", 0),
        ]


class BoundedServer:
    """A gRPC server within bounds. `server` is what services may be registered at; `add` registers one's own."""

    def __init__(
        self,
        bounds: RpcBounds,
        options: Options = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        most_calls: int | None = None,
    ) -> None:
        """Serve nothing yet; more calls at once than `most_calls` are refused."""
        library = [*bounds.options(), *options]
        self.server = cast(Any, _RegisteredOnly(interceptors, library, most_calls))
        self._filter = _LibraryLines(RateLimitedLog(_log, logging.WARNING))

    def add(self, service: RpcService) -> None:
        """Serve a service's methods."""
        self.server.add_registered_method_handlers(service.name, dict(service.methods))

    async def start(self) -> None:
        """Answer calls at the ports that were added."""
        logging.getLogger(_LIBRARY_LOG).addFilter(self._filter)  # for good: streams may outlast the server
        await self.server.start()

    async def stop(self, grace_s: float) -> None:
        """End all calls, after `grace_s` for those that end by themselves."""
        await self.server.stop(grace_s)


class _RegisteredOnly(Server):
    """A server of the library's whose loop accepts registered methods only."""

    def __init__(  # pyright: ignore[reportMissingSuperCall] - which would make a loop that reads any path
        self, interceptors: Sequence[grpc.aio.ServerInterceptor], options: Options, most_calls: int | None
    ) -> None:
        self._loop = _cygrpc.get_working_loop()
        self._server = _Acceptor(self._loop, None, (), tuple(interceptors), tuple(options), most_calls)


class _Acceptor(_cygrpc.AioServer):
    """The library's loop, but that calls of no registered method are turned away beside it."""

    def _make_request_call_future(self, method_bytes: bytes | None) -> asyncio.Future[Any]:
        """Return a future of the next call of a registered method; of others the loop hears when they end."""
        if method_bytes is not None:
            return super()._make_request_call_future(method_bytes)  # pyright: ignore[reportUnknownVariableType]
        loop = asyncio.get_running_loop()
        self._turning_away = loop.create_task(self._turn_away(loop))
        return self._turning_away

    async def _turn_away(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer that there is no such method, without reading which, until the server ends and that raises."""
        nothing, tasks = _cygrpc._MethodResolver([], {}), set[asyncio.Task[None]]()
        while True:
            try:
                call = await self._request_call()
            except Exception:
                if not self.is_running():
                    raise
                await asyncio.sleep(_PAUSE_S)  # a connection broke
                continue
            answer = _cygrpc._handle_rpc("", nothing, (), call, loop, False)
            task = loop.create_task(_cygrpc._schedule_rpc_coro(answer, call, loop, ""))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


class _LibraryLines(logging.Filter):
    """Leaves out what strangers and ends of streams have the library log: tracebacks that tell of no fault here."""

    def __init__(self, lines: RateLimitedLog) -> None:
        super().__init__()
        self._lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is to be written; now and then a header that is no text is told of in a line."""
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return False  # a stream that was given up
        if not str(record.msg).startswith(_NO_TEXT):
            return True
        self._lines.line(record.getMessage())
        return False
