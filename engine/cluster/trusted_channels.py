"""Make gRPC servers and channels that only members of one cluster can use.

Members trust each other as peers do: by one token, which travels as metadata, and by certificates on both sides.
Without certificates nothing leaves this machine. Tokens are compared in a time that does not depend on them.
"""

from collections.abc import Awaitable, Callable, Sequence
from hmac import compare_digest
from typing import Any, cast

import grpc
import grpc.aio

from engine.api.server.listener import most_connections
from engine.rpc.bounded_server import BoundedServer, RpcBounds, RpcService
from transport.base import Address
from transport.control.security import Security, TlsFiles

MOST_MESSAGE_BYTES = 64 << 20
MOST_CONNECTIONS = 4096
_HANDSHAKE_S = 5.0
_IDLE_S = 10.0  # a member always has a stream open
_KEY = "authorization"
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MOST_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_RECONNECTS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)
Metadata = tuple[tuple[str, str], ...]


def call_metadata(security: Security) -> Metadata:
    """Return what a member sends with each call."""
    return ((_KEY, f"Bearer {security.token}"),)


def member_channel(address: str, security: Security) -> grpc.aio.Channel:
    """Return a channel to a member at HOST:PORT. Raises HelloRefused for one elsewhere without certificates."""
    security.check_host(address.rpartition(":")[0].strip("[]"))
    options = [("grpc.max_receive_message_length", MOST_MESSAGE_BYTES), *_OPTIONS, *_RECONNECTS]
    if security.tls is None:
        return grpc.aio.insecure_channel(address, options)
    files = security.tls
    credentials = grpc.ssl_channel_credentials(*_read(files))
    if files.peer_name is not None:
        options.append(("grpc.ssl_target_name_override", cast(int, files.peer_name)))
    return grpc.aio.secure_channel(address, credentials, options)


class MemberServer:
    """A gRPC server for members only. What strangers open is bounded, and closed when nothing comes of it."""

    def __init__(
        self, security: Security, services: Sequence[RpcService], connections: int | None = None
    ) -> None:
        """Serve `services`, once started; `connections` are MOST_CONNECTIONS, or what open files allow."""
        self._security = security
        most = most_connections(None, MOST_CONNECTIONS) if connections is None else connections
        bounds = RpcBounds(most, _HANDSHAKE_S, _IDLE_S, MOST_MESSAGE_BYTES)
        self._server = BoundedServer(bounds, _OPTIONS, [_TokenCheck(security.token)])
        for service in services:
            self._server.add(service)

    async def start(self, address: Address) -> Address:
        """Listen; return where, which tells a port that was left free. Raises OSError, HelloRefused."""
        self._security.check_host(address.host)
        files = self._security.tls
        try:
            if files is None:
                port = self._server.server.add_insecure_port(str(address))
            else:
                authority, key, certificate = _read(files)
                credentials = grpc.ssl_server_credentials([(key, certificate)], authority, True)
                port = self._server.server.add_secure_port(str(address), credentials)
        except RuntimeError as error:  # what grpc raises for an address that is taken
            raise OSError(str(error)) from error
        await self._server.start()
        return Address(address.host, port)

    async def close(self, grace_s: float = 0.0) -> None:
        """End all streams, after `grace_s` for those that end by themselves."""
        await self._server.stop(grace_s)


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Return authority, key and certificate."""
    return files.authority.read_bytes(), files.key.read_bytes(), files.certificate.read_bytes()


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Turns away whoever does not have the token, before anything else of a call is read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Pass the call on, or refuse it."""
        given = [
            str(value) for key, value in cast(Any, handler_call_details).invocation_metadata if key == _KEY
        ]
        if len(given) == 1 and compare_digest(given[0].encode(), self._expected):
            return await continuation(handler_call_details)
        return cast(Any, grpc).stream_stream_rpc_method_handler(_refuse)


async def _refuse(_: object, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
