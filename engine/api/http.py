"""Serve an EngineClient over HTTP: routes, headers, statuses and server-sent events.

It may not know how text is made: `engine.api.generation` takes bodies, and what it returns is written out. Sockets are
`engine.api.server`'s.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
from aiohttp import web

from engine.api import schema
from engine.api.adapters import AdapterAdmin
from engine.api.admin.adapter_push import AdapterPush
from engine.api.admin.admin_routes import AdminRoutes
from engine.api.admin.catalogue_admin import CatalogueAdmin
from engine.api.admin.pushed_files import PushOptions
from engine.api.base import EngineClient
from engine.api.bodies.body_parser import LARGE_BODY_BYTES, BodyParser
from engine.api.errors import FORESEEN, as_api_error
from engine.api.generation import ENDPOINTS, INLINE_TOKENS, Endpoint, Generation
from engine.api.guard import RECORD, Handler, RequestGuard, json_response
from engine.api.openapi.document import document, software_version
from engine.api.openapi.operations import Description, joined
from engine.api.page.page_routes import PageRoutes
from engine.api.server.body import BodyReader, wait_with_continue
from engine.api.status.guarded_app import guarded_app
from engine.api.status.status_routes import StatusRoutes
from engine.config.http_config import HttpConfig
from engine.metrics.series import MetricSeries
from engine.waiting.task_pool import TaskPool
from scheduler.request import Origin

NO_PUSH = PushOptions()
_MOST_RESPONSES = 1 << 20  # waiting to be written: what was generated is not refused any more
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HttpPools:
    """Threads for what would hold up the event loop: reading bodies, writing large responses, telling metrics."""

    text: TaskPool
    responses: TaskPool
    views: TaskPool

    @classmethod
    def make(cls) -> "HttpPools":
        """Make pools that have begun no thread yet."""
        responses = TaskPool("response", 1, most_queued=_MOST_RESPONSES)
        return cls(TaskPool("text", 2), responses, TaskPool("metrics", 1))

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self.text, self.responses, self.views):
            pool.close()


class MoreRoutes(Protocol):
    """Routes that not every server has."""

    @property
    def description(self) -> Description:
        """What the OpenAPI document tells of them."""
        ...

    def table(self, bodies: BodyReader) -> Sequence[web.RouteDef]:
        """List them; `bodies` reads what they are sent."""
        ...

    def series(self) -> Sequence[MetricSeries]:
        """Tell what metrics have of them."""
        ...


def http_app(
    client: EngineClient,
    adapters: AdapterAdmin,
    guard: RequestGuard,
    cors_origins: Sequence[str] = (),
    config: HttpConfig | None = None,
    more: Sequence[MoreRoutes] = (),
    push: PushOptions = NO_PUSH,
) -> web.Application:
    """Make the application: every route of the server, and `more` that need its reader of bodies, behind `guard`."""
    config = config or HttpConfig()
    app = guarded_app(guard, cors_origins, config, client.telemetry)
    pools = HttpPools.make()
    bodies, parser = BodyReader(config, pools.text), BodyParser(client, pools.text)
    described = joined(each.description for each in more)
    routes = _Routes(client, adapters, pools, bodies, parser, described)
    pushed = AdapterPush(client, push)

    def collect() -> list[MetricSeries]:
        return [*client.series(), *(series for each in more for series in each.series())]

    for path, endpoint in ENDPOINTS.items():
        handler = _generate_handler(client, endpoint, pools, bodies, parser)
        app.router.add_post(path, handler, expect_handler=wait_with_continue)
    app.add_routes(
        [
            web.get("/v1/models", routes.models, allow_head=False),
            web.get("/v1/models/{name:.+}", routes.model, allow_head=False),
            web.post("/v1/load_lora_adapter", routes.load, expect_handler=wait_with_continue),
            web.post("/v1/unload_lora_adapter", routes.unload, expect_handler=wait_with_continue),
            web.post("/tokenize", routes.translate, expect_handler=wait_with_continue),
            web.post("/detokenize", routes.translate, expect_handler=wait_with_continue),
            *StatusRoutes(client, pools.views, collect).table(),
            web.get("/openapi.json", routes.openapi, allow_head=False),
            *AdminRoutes(CatalogueAdmin(client, adapters), bodies, pushed).table(),
            *(route for each in more for route in each.table(bodies)),
        ]
    )

    page = PageRoutes(client, pools.views, collect, config.page_watchers)
    app.add_routes(page.table())

    async def stop(_: web.Application) -> None:
        await pushed.close()
        parser.close()
        pools.close()

    app.on_shutdown.append(page.close)
    app.on_cleanup.append(stop)
    return app


def _generate_handler(
    client: EngineClient, endpoint: Endpoint, pools: HttpPools, bodies: BodyReader, parser: BodyParser
) -> Handler:
    async def generate(request: web.Request) -> web.StreamResponse:
        async with bodies.read(request) as body:
            record = request[RECORD]
            parsed = await parser.request(request.path, body, record.tenant)
            del body
        record.model, record.rates = (
            parsed.model,
            partial(client.accounts.headers, record.tenant, parsed.model),
        )
        async with Generation(
            endpoint, client, parsed, pools.responses, Origin(record.tenant, trace=record.trace)
        ) as generation:
            record.counts = generation
            if parsed.form.stream:
                return await _stream(request, generation)
            if await generation.finish() <= INLINE_TOKENS:
                return json_response(generation.response())
            return await pools.responses.run(lambda: json_response(generation.response()))

    return generate


async def _stream(request: web.Request, generation: Generation) -> web.StreamResponse:
    """Write server-sent events. A failure before the first chunk gets a status of its own; later, an event."""
    chunks = generation.chunks()
    first = await anext(chunks)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        await response.prepare(request)
        await response.write(_event(first))
        await response.write(await _write_rest(request, response, chunks))
        await response.write_eof()
    except ConnectionError:
        request[RECORD].client_gone = True
    return response


async def _write_rest(
    request: web.Request, response: web.StreamResponse, chunks: AsyncIterator[dict[str, object]]
) -> bytes:
    """Write the chunks after the first one; return the event that ends the stream."""
    try:
        async for chunk in chunks:
            await response.write(_event(chunk))
    except ConnectionError:
        raise
    except FORESEEN as error:
        return _event(as_api_error(error).body())
    except Exception as error:  # noqa: BLE001 - as in RequestGuard
        _log.exception("a stream of %s failed in a way that nobody foresaw", request.path)
        return _event(as_api_error(error).body())
    return b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class _Routes:
    """The handlers of every route but the endpoints that generate."""

    def __init__(
        self,
        client: EngineClient,
        adapters: AdapterAdmin,
        pools: HttpPools,
        bodies: BodyReader,
        parser: BodyParser,
        more: Description,
    ) -> None:
        self._client = client
        self._adapters = adapters
        self._pools = pools
        self._bodies = bodies
        self._parser = parser
        self._more = more

    async def models(self, request: web.Request) -> web.Response:
        """Answer GET /v1/models."""
        listed, tenant = self._adapters.models, request[RECORD].tenant
        return await self._pools.views.run(lambda: json_response({"object": "list", "data": listed(tenant)}))

    async def model(self, request: web.Request) -> web.Response:
        """Answer GET /v1/models/{name}."""
        name, tenant = request.match_info["name"], request[RECORD].tenant
        return await self._pools.views.run(lambda: json_response(self._adapters.model(name, tenant)))

    async def load(self, request: web.Request) -> web.Response:
        """Answer POST /v1/load_lora_adapter."""
        async with self._bodies.read(request, LARGE_BODY_BYTES) as body:
            wire = schema.decoded(bytes(body), schema.LoadAdapter)
        request[RECORD].model = wire.lora_name
        return json_response(await self._adapters.load(wire))

    async def unload(self, request: web.Request) -> web.Response:
        """Answer POST /v1/unload_lora_adapter."""
        async with self._bodies.read(request, LARGE_BODY_BYTES) as body:
            wire = schema.decoded(bytes(body), schema.UnloadAdapter)
        request[RECORD].model = wire.lora_name
        await self._client.unload_adapter(wire.lora_name)
        return json_response({"id": wire.lora_name, "object": "model", "deleted": True})

    async def translate(self, request: web.Request) -> web.Response:
        """Answer POST /tokenize and POST /detokenize."""
        async with self._bodies.read(request) as body:
            content = await self._parser.response(request.path, body, request[RECORD].tenant)
        return web.Response(body=content, content_type="application/json")

    async def openapi(self, request: web.Request) -> web.Response:
        """Answer GET /openapi.json."""
        return json_response(document(software_version(), self._more))
