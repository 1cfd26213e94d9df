"""Answer whoever looks after a server: its health, version and metrics."""

from aiohttp import web

from engine.api.base import ObservedServer
from engine.api.guard import json_response
from engine.api.openapi.document import software_version
from engine.metrics import telemetry
from engine.metrics.series import CollectSeries
from engine.waiting.task_pool import TaskPool


class StatusRoutes:
    """The handlers of what every server tells of itself."""

    def __init__(self, server: ObservedServer, views: TaskPool, collect: CollectSeries) -> None:
        """Tell how `server` does, and its metrics as `collect` has them; `views` writes what takes long."""
        self._server, self._views, self._collect = server, views, collect

    def table(self) -> list[web.RouteDef]:
        """List the routes."""
        return [
            web.get("/health", self._health),
            web.get("/version", self._version),
            web.get("/metrics", self._metrics),
        ]

    async def _health(self, request: web.Request) -> web.Response:
        """Answer GET /health: 200 while the server does its work, else 503 and why not."""
        trouble = self._server.stats().trouble
        if trouble is None:
            return json_response({"status": "ok"})
        return json_response({"status": "unhealthy", "reason": trouble}, 503)

    async def _version(self, request: web.Request) -> web.Response:
        """Answer GET /version."""
        return json_response({"version": software_version()})

    async def _metrics(self, request: web.Request) -> web.Response:
        """Answer GET /metrics, in Prometheus' text format."""
        stats, series = self._server.stats(), self._collect()
        text = await self._views.run(lambda: self._server.telemetry.render(stats, series))
        return web.Response(body=text, headers={"Content-Type": telemetry.CONTENT_TYPE})
