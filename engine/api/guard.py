"""Surround every HTTP handler: a request id, the API key, and OpenAI's error body for whatever goes wrong.

It may not know what the handlers do.
"""

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from hmac import compare_digest
from http import HTTPStatus

import msgspec
from aiohttp import web

from engine.api.errors import FORESEEN, ApiError, as_api_error, refused

MAX_BODY_BYTES = 16 << 20
_OPEN_PATHS = frozenset({"/health", "/version"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_REQUEST_ID_KEY = web.RequestKey("request_id", str)
_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_response(value: object, status: int = 200) -> web.Response:
    """Make a response of a value that msgspec can write as JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


def _error_response(error: ApiError) -> web.Response:
    response = json_response(error.body(), error.status)
    response.headers.update(error.headers)
    return response


async def set_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Tell the client its request id: a signal of every response that is about to be sent."""
    if (request_id := request.get(_REQUEST_ID_KEY)) is not None:
        response.headers["X-Request-Id"] = request_id


@web.middleware
class RequestGuard:
    """What surrounds every handler: request id, API key, and OpenAI's error body for whatever goes wrong."""

    def __init__(self, api_key: str | None) -> None:
        """Ask for `api_key`, or for none if it is None."""
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer `request` by `handler`, or by the error that it raises."""
        began_s = time.monotonic()
        try:
            request[_REQUEST_ID_KEY] = _request_id(request)
            self._check_key(request)
            response = await handler(request)
        except web.HTTPException as error:
            response = _error_response(_routing_error(error, request))
            response.headers.update({"Allow": error.headers["Allow"]} if "Allow" in error.headers else {})
        except FORESEEN as error:
            response = _error_response(as_api_error(error))
        except Exception as error:  # noqa: BLE001 - the server's boundary: logged, and answered
            _log.exception("%s %s failed in a way that nobody foresaw", request.method, request.path)
            response = _error_response(as_api_error(error))
        took_s = time.monotonic() - began_s
        _log.debug("%s %s %d %.3f s", request.method, request.path, response.status, took_s)
        return response

    def _check_key(self, request: web.Request) -> None:
        if self._expected is None or request.path in _OPEN_PATHS:
            return
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not compare_digest(given, self._expected):
            message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, None, "invalid_api_key")


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id")
    if given is None:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(given):
        raise refused("X-Request-Id", "give 1 to 128 letters, digits or any of ._:/+=@-", "invalid_value")
    return given


def _routing_error(error: web.HTTPException, request: web.Request) -> ApiError:
    """Express aiohttp's own refusals in OpenAI's words."""
    match error.status:
        case HTTPStatus.NOT_FOUND:
            return ApiError(404, f"there is nothing at {request.path}", None, "unknown_url")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = error.headers.get("Allow", "another method")
            return ApiError(405, f"{request.path} takes {allowed}, not {request.method}", None, "method")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return ApiError(413, f"the request body is over {MAX_BODY_BYTES} bytes", None, "body_too_large")
        case _:
            return ApiError(error.status, error.reason, None, None)
