"""Serve an EngineClient over gRPC, with the names and numbers of vLLM's services, and one of our own.

It knows no rule of its own: what HTTP refuses is refused here, by the same functions.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.api.adapters import AdapterAdmin
from engine.api.admin.catalogue_admin import CatalogueAdmin
from engine.api.base import EngineClient
from engine.api.server.listener import most_connections
from engine.config.config import ServeConfig
from engine.config.http_config import HttpConfig
from engine.errors import InvalidConfig
from engine.rpc.adapters_service import ADAPTERS, AdaptersService
from engine.rpc.bounded_server import BoundedServer, RpcBounds, milliseconds
from engine.rpc.control_service import CONTROL, ControlService
from engine.rpc.inference_service import INFERENCE, InferenceService
from engine.rpc.live_calls import LiveCalls
from engine.rpc.rpc_guard import RpcGuard
from engine.waiting.task_pool import TaskPool

_grpc, _health_rpc, _health = cast(Any, grpc), cast(Any, health_pb2_grpc), cast(Any, health)
_TEXT_THREADS = 2
_OTHER_CALLS = 64  # at once, beside those that may wait to run
_CLOSE_S = 5.0
_HEALTH_S = 0.5  # between looks


class RpcServer:
    """The services on a socket."""

    def __init__(
        self,
        client: EngineClient,
        admin: AdapterAdmin,
        guard: RpcGuard,
        config: ServeConfig,
        stop: Callable[[], None],
    ) -> None:
        """Listen nowhere yet; `stop` begins to shut the server down."""
        self._guard, self._config = guard, config
        self._texts = TaskPool("gRPC text", _TEXT_THREADS)
        live = LiveCalls()
        self._methods = {
            INFERENCE: InferenceService(client, live, self._texts).methods(),
            CONTROL: ControlService(client, admin, config, live, stop).methods(),
            ADAPTERS: AdaptersService(CatalogueAdmin(client, admin)).methods(),
        }
        self._client, self._health = client, _health.aio.HealthServicer()
        self._watch: asyncio.Task[None] | None = None  # of the client's health
        self._server: BoundedServer | None = None

    async def listen(self, host: str, port: int) -> str:
        """Listen at a host and port (0 for any that is free) and return the address. Raises InvalidConfig."""
        http, most_calls = self._config.http, self._config.max_waiting + _OTHER_CALLS
        most = most_connections(http.max_connections)
        bounds = RpcBounds(most, http.header_timeout_s, http.idle_timeout_s, http.max_body_bytes)
        bounded = self._server = BoundedServer(bounds, _pings(http), most_calls=most_calls)
        server = bounded.server
        for name, methods in self._methods.items():
            bounded.add(self._guard.service(name, methods))
        _health_rpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._methods, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
        cast(Any, reflection).enable_server_reflection(names, server)
        address = f"[{host}]" if ":" in host else host
        try:
            bound = self._bind(server, f"{address}:{port}")
        except RuntimeError as error:
            reason = f"{host} cannot be bound to it: choose another port or --host"
            raise InvalidConfig("grpc_port", port, reason) from error
        await bounded.start()
        serving = await self._tell_health(None)
        self._watch = asyncio.create_task(self._watch_health(serving))
        return f"grpc://{address}:{bound}"

    async def stop_serving(self) -> None:
        """Tell whoever asks for health that nothing new is taken."""
        await self._end_watch()
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        """End every call, after a while for clients to take the rest of their answers."""
        await self._end_watch()
        if self._server is not None:
            await self._server.stop(_CLOSE_S)
        self._texts.close()

    async def _tell_health(self, told: bool | None) -> bool:
        """Tell the client's health if it is not what was told; return what is told now."""
        healthy = self._client.stats().trouble is None
        if healthy is not told:
            states = health_pb2.HealthCheckResponse
            for name in ("", *self._methods):
                await self._health.set(name, states.SERVING if healthy else states.NOT_SERVING)
        return healthy

    async def _watch_health(self, told: bool) -> None:
        while True:
            await asyncio.sleep(_HEALTH_S)
            told = await self._tell_health(told)

    async def _end_watch(self) -> None:
        if (watch := self._watch) is not None:
            self._watch = None
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    def _bind(self, server: grpc.aio.Server, address: str) -> int:
        access = self._config.access
        if access.tls_cert is None or access.tls_key is None:
            return server.add_insecure_port(address)
        pair = (Path(access.tls_key).read_bytes(), Path(access.tls_cert).read_bytes())
        return server.add_secure_port(address, _grpc.ssl_server_credentials([pair]))


def _pings(http: HttpConfig) -> list[tuple[str, int]]:
    """Return when a client that answers no ping any more is given up: what it asked for is freed."""
    within_ms = milliseconds(http.write_timeout_s)
    return [("grpc.keepalive_time_ms", within_ms), ("grpc.keepalive_timeout_ms", within_ms)]
