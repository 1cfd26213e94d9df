"""HTTP: the aiohttp door. Routes, headers, statuses and server-sent events around an EngineClient.

It may not know how text is made: bodies go to `engine.api.generation`, and what comes back is written out.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from hmac import compare_digest
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version

import msgspec
from aiohttp import web

from engine import telemetry
from engine.api import schema
from engine.api.adapters import AdapterAdmin
from engine.api.engine_client import EngineClient
from engine.api.errors import FORESEEN, ApiError, as_api_error, refused
from engine.api.generation import ENDPOINTS, Endpoint, Reply
from engine.api.parsing import chat_messages, check_model, check_token_ids

MAX_BODY_BYTES = 16 << 20
_INLINE_BODY_BYTES = 64 << 10  # larger ones are read in a thread, so that no other stream waits for them
_LINGER_S = 5.0  # for clients to take the rest of their answers when the server stops
_OPEN_PATHS = frozenset({"/health", "/version"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_REQUEST_ID_KEY = web.RequestKey("request_id", str)
_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def http_app(desk: EngineClient, adapters: AdapterAdmin, api_key: str | None) -> web.Application:
    """The application: every route of the server. `api_key` None opens all of them."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_Guard(api_key)])
    app.on_response_prepare.append(_name_response)
    routes = _Routes(desk, adapters)
    for path, endpoint in ENDPOINTS.items():
        app.router.add_post(path, _generator(desk, endpoint))
    app.add_routes(
        [
            web.get("/v1/models", routes.models, allow_head=False),
            web.get("/v1/models/{name:.+}", routes.model, allow_head=False),
            web.post("/v1/load_lora_adapter", routes.load),
            web.post("/v1/unload_lora_adapter", routes.unload),
            web.post("/tokenize", routes.tokenize),
            web.post("/detokenize", routes.detokenize),
            web.get("/health", routes.health),
            web.get("/version", routes.version),
            web.get("/metrics", routes.metrics),
        ]
    )
    return app


def http_runner(app: web.Application) -> web.AppRunner:
    """The application ready to be bound; a handler is cancelled when its client leaves."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_LINGER_S)


def json_response(value: object, status: int = 200) -> web.Response:
    """`value` as JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


def _error_response(error: ApiError) -> web.Response:
    response = json_response(error.body(), error.status)
    response.headers.update(error.headers)
    return response


async def _name_response(request: web.Request, response: web.StreamResponse) -> None:
    if (request_id := request.get(_REQUEST_ID_KEY)) is not None:
        response.headers["X-Request-Id"] = request_id


@web.middleware
class _Guard:
    """Around every handler: request id, API key, and OpenAI's error body for whatever goes wrong."""

    def __init__(self, api_key: str | None) -> None:
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
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
        except Exception as error:  # noqa: BLE001 - the door's boundary: logged, and told to the client
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
    """aiohttp's own refusals in OpenAI's words."""
    match error.status:
        case HTTPStatus.NOT_FOUND:
            return ApiError(404, f"there is nothing at {request.path}", None, "unknown_url")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = error.headers.get("Allow", "another method")
            return ApiError(405, f"{request.path} takes {allowed}, not {request.method}", None, "method")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return ApiError(413, f"the request body is over {MAX_BODY_BYTES} bytes", None, "body_too_large")
    return ApiError(error.status, error.reason, None, None)


def _generator(desk: EngineClient, endpoint: Endpoint) -> Handler:
    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if len(body) > _INLINE_BODY_BYTES:
            ask = await asyncio.to_thread(endpoint.read, body, desk)
        else:
            ask = endpoint.read(body, desk)
        async with endpoint.reply(desk, ask) as reply:
            if ask.stream:
                return await _stream(request, reply)
            return json_response(await reply.whole())

    return generate


async def _stream(request: web.Request, reply: Reply) -> web.StreamResponse:
    """Server-sent events. What fails before the first chunk is answered with a status; later, with an event."""
    chunks = reply.chunks()
    first = await anext(chunks)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        await response.write(_event(first))
        async for chunk in chunks:
            await response.write(_event(chunk))
        await response.write(b"data: [DONE]\n\n")
    except ConnectionError:
        return response  # the client has left; there is nobody to answer
    except FORESEEN as error:
        await response.write(_event(as_api_error(error).body()))
    except Exception as error:  # noqa: BLE001 - as in _Guard
        _log.exception("a stream of %s failed in a way that nobody foresaw", request.path)
        await response.write(_event(as_api_error(error).body()))
    await response.write_eof()
    return response


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class _Routes:
    """The handlers beside generation."""

    def __init__(self, desk: EngineClient, adapters: AdapterAdmin) -> None:
        self._desk = desk
        self._adapters = adapters

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": self._adapters.models()})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{name}."""
        return json_response(self._adapters.model(request.match_info["name"]))

    async def load(self, request: web.Request) -> web.Response:
        """POST /v1/load_lora_adapter."""
        wire = schema.decoded(await request.read(), schema.LoadAdapter)
        return json_response(await self._adapters.load(wire.lora_name, wire.lora_path))

    async def unload(self, request: web.Request) -> web.Response:
        """POST /v1/unload_lora_adapter."""
        wire = schema.decoded(await request.read(), schema.UnloadAdapter)
        await self._desk.unload_adapter(wire.lora_name)
        return json_response({"id": wire.lora_name, "object": "model", "deleted": True})

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize."""
        wire = schema.decoded(await request.read(), schema.Tokenize)
        check_model(wire.model or self._desk.model_name, self._desk)
        codec = self._desk.codec
        if (wire.prompt is None) == (wire.messages is None):
            raise refused("prompt", "give either prompt or messages", "invalid_value")
        if wire.prompt is not None:
            tokens = codec.encode(wire.prompt, wire.add_special_tokens)
        else:
            tokens = codec.encode_chat(chat_messages(wire.messages or ()), wire.add_generation_prompt)
        found = {"count": len(tokens), "max_model_len": self._desk.max_model_len, "tokens": tokens}
        texts = (
            {"token_strs": [codec.token_text(token) for token in tokens]} if wire.return_token_strs else {}
        )
        return json_response(found | texts)

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize."""
        wire = schema.decoded(await request.read(), schema.Detokenize)
        check_model(wire.model or self._desk.model_name, self._desk)
        check_token_ids("tokens", wire.tokens, self._desk.vocab_size)
        return json_response({"prompt": self._desk.codec.decode(wire.tokens, skip_special=False)})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 while the engine runs, else 503."""
        healthy = self._desk.stats().healthy
        return json_response({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    async def version(self, request: web.Request) -> web.Response:
        """GET /version."""
        return json_response({"version": _version()})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics, in Prometheus' text format."""
        text = await asyncio.to_thread(self._desk.telemetry.render, self._desk.stats())
        return web.Response(body=text, headers={"Content-Type": telemetry.CONTENT_TYPE})


def _version() -> str:
    try:
        return version("loraserve")
    except PackageNotFoundError:
        return "unknown: run from a folder that was never installed"
