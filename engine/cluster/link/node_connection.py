"""Hold a router's end of the link to one node: connected again and again while the node is a member."""

import asyncio
import logging
import random
from typing import Any, Protocol, cast

import grpc
import grpc.aio

from engine.cluster.link.link_messages import (
    METHOD,
    SERVICE,
    VERSION,
    FromRouter,
    LinkError,
    LoadTold,
    NodeReady,
    OpenLink,
    RequestFailed,
    Tokens,
    encoded,
    read_from_node,
)
from engine.cluster.link.silence_bound import silence_bound
from engine.cluster.trusted_channels import call_metadata, member_channel
from engine.cluster.view import Member
from transport.control.security import Security
from transport.errors import HelloRefused

_TURN_S, _SILENT_TURNS = 0.1, 20  # a node tells its load ten times a second
_CONNECT_S = 3.0
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.05, 1.0
_BREAKS = (grpc.RpcError, LinkError, HelloRefused, TimeoutError, StopAsyncIteration, OSError, ValueError)
_log = logging.getLogger(__name__)


class LinkListener(Protocol):
    """Whoever is told what a node says. All calls come on the event loop."""

    def connected(self, node: str, ready: NodeReady) -> None:
        """Note that the node can be sent requests. Raises LinkError if it serves something else."""
        ...

    def told(self, node: str, message: LoadTold | Tokens | RequestFailed) -> None:
        """Take in a message."""
        ...

    def lost(self, node: str) -> None:
        """Note that the connection broke: what was there is not heard of again."""
        ...


class NodeConnection:
    """A link that is opened anew, after a pause, whenever it breaks. Used on one event loop."""

    def __init__(self, member: Member, hello: OpenLink, security: Security, listener: LinkListener) -> None:
        """Connect to `member` once started."""
        self.member = member
        self._hello, self._security, self._listener = hello, security, listener
        self._sending: asyncio.Queue[bytes] | None = None  # while it is connected
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._stay_connected())

    def send(self, message: FromRouter) -> bool:
        """Send a message after those that wait; return False if there is no connection."""
        if self._sending is None:
            return False
        self._sending.put_nowait(encoded(message))
        return True

    async def close(self) -> None:
        """End the connection, and connect no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _stay_connected(self) -> None:
        pause_s, name = _LEAST_PAUSE_S, self.member.name
        while True:
            try:
                await self._connect()
                pause_s = _LEAST_PAUSE_S
            except _BREAKS as error:
                _log.info("node %s cannot be reached: %s", name, _said(error))
            finally:
                was_connected, self._sending = self._sending is not None, None
                if was_connected:
                    pause_s = _LEAST_PAUSE_S
                    self._listener.lost(name)
            await asyncio.sleep(pause_s * (1 + random.random()))
            pause_s = min(_MOST_PAUSE_S, 2 * pause_s)

    async def _connect(self) -> None:
        """Open a stream, and take in what comes until it ends or is silent."""
        async with member_channel(self.member.address, self._security) as channel:
            method = cast(Any, channel).stream_stream(f"/{SERVICE}/{METHOD}")
            call = method(metadata=call_metadata(self._security))
            writing: asyncio.Task[None] | None = None
            try:
                incoming = aiter(call)
                async with asyncio.timeout(_CONNECT_S):
                    await call.write(encoded(self._hello))
                    ready = read_from_node(await anext(incoming))
                if not isinstance(ready, NodeReady) or ready.version != VERSION:
                    raise LinkError(f"a node begins with NodeReady of version {VERSION}")
                self._listener.connected(self.member.name, ready)
                self._sending = asyncio.Queue()
                writing = asyncio.create_task(_write(call, self._sending))
                async with silence_bound(_TURN_S, _SILENT_TURNS) as hear:
                    while True:
                        message = read_from_node(await anext(incoming))
                        hear()
                        if isinstance(message, NodeReady):
                            raise LinkError("NodeReady comes once, at the beginning")
                        self._listener.told(self.member.name, message)
            finally:
                call.cancel()
                if writing is not None:
                    writing.cancel()
                    await asyncio.gather(writing, return_exceptions=True)


async def _write(call: Any, sending: asyncio.Queue[bytes]) -> None:
    while True:
        await call.write(await sending.get())


def _said(error: BaseException) -> str:
    """Return what is to be told of an error, in one line."""
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return " ".join((details or type(error).__name__).split())
