"""Surround every HTTP handler: a request id, the keys, and OpenAI's error body for whatever goes wrong.

It may not know what the handlers do.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web

from engine.api.errors import FORESEEN, ApiError, as_api_error
from engine.api.keys import AccessRules, Permission, is_local
from engine.api.schema import is_request_id
from engine.metrics.request_log import RequestLog, RequestRecord
from lora.format.adapter_files import short

_CATALOGUE = ("", "/{name}", "/alias", "/pin", "/unpin", "/limit", "/hold", "/release", "/abort")
_PERMISSIONS = {
    "/health": Permission.NOTHING,
    "/version": Permission.NOTHING,
    "/metrics": Permission.METRICS,
    "/v1/load_lora_adapter": Permission.ADMINISTER,
    "/v1/unload_lora_adapter": Permission.ADMINISTER,
    "/cluster": Permission.INSPECT,
    "/debug/steps": Permission.INSPECT,
    "/": Permission.NOTHING,  # the page has no data in it: it asks for a key, and sends that
    "/page/{file}": Permission.NOTHING,
    "/page/events": Permission.INSPECT,
    **dict.fromkeys((f"/v1/adapters{path}" for path in _CATALOGUE), Permission.ADMINISTER),
}
RECORD = web.RequestKey("record", RequestRecord)
"""Where a request's handler finds what the log will say of it."""
_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_response(value: object, status: int = 200) -> web.Response:
    """Make a response of a value that msgspec can write as JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


def _error_response(error: ApiError) -> web.Response:
    response = json_response(error.body(), error.status)
    response.headers.update(error.headers)
    if error.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def set_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Tell the client its request id and what is left of its limits: a signal of every response before it is sent."""
    if (record := request.get(RECORD)) is not None:
        record.status = response.status
        response.headers["X-Request-Id"] = record.request_id
        response.headers.update(record.rates())


@web.middleware
class RequestGuard:
    """What surrounds every handler: request id, keys, and OpenAI's error body for whatever goes wrong."""

    def __init__(self, rules: AccessRules, log: RequestLog) -> None:
        """Let in whom `rules` let in, and tell `log` of every request when it has ended."""
        self._rules, self._log = rules, log

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer `request` by `handler`, or by the error that it raises."""
        path = request.rel_url.raw_path
        record = RequestRecord(_request_id(request), request.remote or "", request.method, path)
        request[RECORD] = record
        try:
            try:
                return await self._answer(request, handler, record)
            finally:
                await self._log.write_audit(record)
        except asyncio.CancelledError:
            record.client_gone = request.transport is None  # else the server stops
            raise
        finally:
            self._log.write_access(record)

    async def _answer(
        self, request: web.Request, handler: Handler, record: RequestRecord
    ) -> web.StreamResponse:
        needed = _needed(request)
        record.administers = needed is Permission.ADMINISTER
        if needed in (Permission.ASK, Permission.ADMINISTER):  # what looks in every few seconds is no request
            self._log.begin(record, request.headers)
        try:
            authorization = request.headers.get("Authorization")
            bearer = self._rules.admit(needed, authorization, is_local(request.remote, request.headers))
            record.key, record.tenant, record.sees_all = bearer.key, bearer.tenant, bearer.sees_all
            if record.administers:
                await self._log.wait_for_audit()
            response = await handler(request)
        except web.HTTPException as error:
            routing = _routing_error(error, request)
            record.code, response = routing.code, _error_response(routing)
            response.headers.update({"Allow": error.headers["Allow"]} if "Allow" in error.headers else {})
        except FORESEEN as error:
            foreseen = as_api_error(error)
            record.code, response = foreseen.code, _error_response(foreseen)
        except Exception as error:  # noqa: BLE001 - the server's boundary: logged, and answered
            _log.exception("%s %.300a failed in a way that nobody foresaw", request.method, request.path)
            unforeseen = as_api_error(error)
            record.code, response = unforeseen.code, _error_response(unforeseen)
        record.status = response.status
        return response


def _needed(request: web.Request) -> Permission:
    """Return what the route that was found needs, however its path was spelled."""
    resource = request.match_info.route.resource
    needed = Permission.ASK if resource is None else _PERMISSIONS.get(resource.canonical, Permission.ASK)
    reads = needed is Permission.ADMINISTER and request.method == "GET"
    return Permission.INSPECT if reads else needed


def _request_id(request: web.Request) -> str:
    """Return the client's id for the request, or a new one where it gave none that a log may hold."""
    given = request.headers.get("X-Request-Id", "")
    return given if is_request_id(given) else uuid.uuid4().hex


def _routing_error(error: web.HTTPException, request: web.Request) -> ApiError:
    """Express aiohttp's own refusals in OpenAI's words."""
    path = short(request.path)
    match error.status:
        case HTTPStatus.NOT_FOUND:
            return ApiError(404, f"there is nothing at {path}", None, "unknown_url")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = error.headers.get("Allow", "another method")
            return ApiError(405, f"{path} takes {allowed}, not {request.method}", None, "method")
        case _:
            return ApiError(error.status, error.reason, None, None)
