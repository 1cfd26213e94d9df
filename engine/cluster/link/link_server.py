"""Let routers run requests on this node: one stream for each router.

A stream that breaks takes its requests with it: the router sends them elsewhere.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import grpc

from engine.api.server.rate_limited_log import RateLimitedLog, printable
from engine.cluster.link.link_messages import (
    METHOD,
    SERVICE,
    VERSION,
    LinkError,
    LoadTold,
    OpenLink,
    read_from_router,
)
from engine.cluster.link.router_stream import Context, LinkedNode, NodeIdentity, RouterStream
from engine.rpc.bounded_server import RpcService

LOAD_S = 0.1
_HELLO_S = 5.0
_log = logging.getLogger(__name__)


class LinkServer:
    """The node's end of all links. Used on one event loop; `service` is what a gRPC server is to serve."""

    def __init__(self, node: LinkedNode) -> None:
        """Serve `node` to routers."""
        self._node = node
        self._streams: dict[str, RouterStream] = {}
        self._garbage = RateLimitedLog(_log, logging.WARNING)
        self._teller: asyncio.Task[None] | None = None

    @property
    def identity(self) -> NodeIdentity:
        """What the node is called, and what it serves."""
        return self._node.identity

    def service(self) -> RpcService:
        """Return what a gRPC server is to serve; messages are bytes to it."""
        return RpcService(SERVICE, {METHOD: cast(Any, grpc).stream_stream_rpc_method_handler(self._open)})

    async def start(self) -> None:
        """Begin to tell routers the load."""
        self._teller = asyncio.create_task(self._tell_loads())

    def drain(self) -> None:
        """Take nothing new; what runs goes on."""
        self._node.draining = True
        self._tell_load()

    async def drained(self, timeout_s: float) -> None:
        """Wait, at most `timeout_s`, for what runs to end."""
        until_s = time.monotonic() + timeout_s
        while len(self._node.jobs) and time.monotonic() < until_s:
            await asyncio.sleep(LOAD_S)

    async def close(self) -> None:
        """End all streams: what still runs moves to other nodes."""
        if self._teller is not None:
            self._teller.cancel()
            with suppress(asyncio.CancelledError):
                await self._teller
        for stream in tuple(self._streams.values()):
            stream.end()

    async def _open(self, incoming: AsyncIterator[bytes], context: Context) -> None:
        stream: RouterStream | None = None
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = read_from_router(await anext(aiter(incoming)))
            if not isinstance(hello, OpenLink) or hello.version != VERSION:
                raise LinkError(f"a link begins with OpenLink of version {VERSION}")
            name = f"{hello.router}/{hello.start}"
            if (before := self._streams.get(name)) is not None:
                before.end()
            stream = self._streams[name] = RouterStream(name, self._node)
            await stream.run(incoming, context)
        except (LinkError, TimeoutError, StopAsyncIteration) as error:
            self._garbage.line(f"a router's link is closed: {printable(str(error) or type(error).__name__)}")
        finally:
            if stream is not None:
                stream.end()
                if self._streams.get(stream.name) is stream:
                    del self._streams[stream.name]

    async def _tell_loads(self) -> None:
        while True:
            self._tell_load()
            await asyncio.sleep(LOAD_S)

    def _tell_load(self) -> None:
        load = self._node.jobs.load(self._node.draining)
        for stream in self._streams.values():
            stream.send(LoadTold(replace(load, heard=stream.heard)))
