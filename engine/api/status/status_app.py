"""Serve a server that answers no requests over HTTP: its health, metrics, cluster and page, and nothing else."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from engine.api.base import ObservedServer
from engine.api.guard import RequestGuard, json_response
from engine.api.page.page_routes import PageRoutes
from engine.api.status.guarded_app import guarded_app
from engine.api.status.status_routes import StatusRoutes
from engine.config.http_config import HttpConfig
from engine.waiting.task_pool import TaskPool


def status_app(
    server: ObservedServer, guard: RequestGuard, config: HttpConfig, cors_origins: Sequence[str] = ()
) -> web.Application:
    """Make the application: what there is to tell of `server`, behind `guard`."""
    app, views = guarded_app(guard, cors_origins, config, server.telemetry), TaskPool("metrics", 1)
    page = PageRoutes(server, views, server.series, config.page_watchers, answers=False)

    async def cluster(_: web.Request) -> web.Response:
        return json_response(msgspec.to_builtins(await server.catalogue.cluster()))

    async def stop(_: web.Application) -> None:
        views.close()

    app.add_routes(
        [*StatusRoutes(server, views, server.series).table(), web.get("/cluster", cluster, allow_head=False)]
    )
    app.add_routes(page.table())
    app.on_shutdown.append(page.close)
    app.on_cleanup.append(stop)
    return app
