"""Answer administrators over HTTP: the cluster, the last steps, and what reads and changes the registry of adapters."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web

from engine.api import schema
from engine.api.admin.adapter_push import AdapterPush
from engine.api.admin.admin_schema import (
    AbortAdapter,
    AliasAdapter,
    HoldAdapter,
    LimitAdapter,
    PinAdapter,
    RegisterAdapter,
    ReleaseAdapter,
    UnpinAdapter,
)
from engine.api.admin.catalogue_admin import CatalogueAdmin
from engine.api.bodies.body_parser import LARGE_BODY_BYTES
from engine.api.guard import RECORD, Handler, json_response
from engine.api.server.body import BodyReader, wait_with_continue

Body = TypeVar(
    "Body", RegisterAdapter, AliasAdapter, PinAdapter, UnpinAdapter, LimitAdapter, HoldAdapter, ReleaseAdapter,
    AbortAdapter,
)  # fmt: skip


class AdminRoutes:
    """The handlers of the administrators' routes."""

    def __init__(self, admin: CatalogueAdmin, bodies: BodyReader, push: AdapterPush) -> None:
        self._admin, self._bodies, self._push = admin, bodies, push

    def table(self) -> list[web.RouteDef]:
        """List the routes."""
        admin = self._admin
        posts: list[tuple[str, Handler]] = [
            ("/v1/adapters", self._change(RegisterAdapter, admin.register)),
            ("/v1/adapters/alias", self._change(AliasAdapter, admin.alias)),
            ("/v1/adapters/pin", self._change(PinAdapter, admin.pin)),
            ("/v1/adapters/unpin", self._change(UnpinAdapter, lambda wire: admin.unpin(wire.name))),
            ("/v1/adapters/limit", self._change(LimitAdapter, admin.limit)),
            ("/v1/adapters/hold", self._change(HoldAdapter, admin.hold)),
            ("/v1/adapters/release", self._change(ReleaseAdapter, lambda wire: admin.release(wire.name))),
            ("/v1/adapters/abort", self._change(AbortAdapter, lambda wire: admin.abort(wire.name))),
        ]
        return [
            web.get("/cluster", self._cluster, allow_head=False),
            web.get("/debug/steps", self._steps, allow_head=False),
            web.get("/v1/adapters", self._list, allow_head=False),
            web.get("/v1/adapters/{name:.+}", self._one, allow_head=False),
            web.delete("/v1/adapters/{name:.+}", self._remove),
            web.put("/v1/adapters/{name:.+}", self._put, expect_handler=wait_with_continue),
            *(web.post(path, handler, expect_handler=wait_with_continue) for path, handler in posts),
        ]

    def _change(self, kind: type[Body], change: Callable[[Body], Awaitable[dict[str, object]]]) -> Handler:
        """Make the handler of a change: it reads a body of this kind, and answers with what came of it."""

        async def handle(request: web.Request) -> web.StreamResponse:
            async with self._bodies.read(request, LARGE_BODY_BYTES) as body:
                wire = schema.decoded(bytes(body), kind)
            request[RECORD].model = wire.name
            return json_response(await change(wire))

        return handle

    async def _cluster(self, request: web.Request) -> web.Response:
        return json_response(await self._admin.cluster())

    async def _steps(self, request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": self._admin.steps()})

    async def _list(self, request: web.Request) -> web.Response:
        return json_response(await self._admin.page(request.query))

    async def _one(self, request: web.Request) -> web.Response:
        return json_response(await self._admin.one(request.match_info["name"]))

    async def _remove(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        request[RECORD].model = name
        before = await self._push.record(name)
        removed = await self._admin.remove(name)
        await self._push.forget(name, before)
        return json_response(removed)

    async def _put(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        request[RECORD].model = name
        digest = await self._push.put(name, request)
        return json_response(await self._admin.one(name) | {"digest": digest})
