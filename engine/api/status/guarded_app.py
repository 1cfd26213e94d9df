"""Make an application whose every route is behind a guard, and whose event loop is watched."""

from collections.abc import Sequence

from aiohttp import web

from engine.api.cors import Cors
from engine.api.guard import RequestGuard, set_request_id
from engine.api.server.connection import note_beginning
from engine.api.server.loop_lag import LoopLag
from engine.config.http_config import HttpConfig
from engine.metrics.telemetry import Telemetry


def guarded_app(
    guard: RequestGuard, cors_origins: Sequence[str], config: HttpConfig, telemetry: Telemetry
) -> web.Application:
    """Make an application without routes; while it runs, `telemetry` is told how late the event loop comes."""
    cors, lag = Cors(cors_origins), LoopLag(telemetry.loop_was_late)
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[note_beginning, cors, guard])
    app.on_response_prepare.extend((set_request_id, cors.mark))

    async def start(_: web.Application) -> None:
        lag.start()

    async def stop(_: web.Application) -> None:
        lag.stop()

    app.on_startup.append(start)
    app.on_cleanup.append(stop)
    return app
