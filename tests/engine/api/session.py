"""The real application on a loopback port that the system picks, over a fake engine."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai

from engine.api.adapters import AdapterAdmin
from engine.api.admin.pushed_files import PushOptions
from engine.api.guard import RequestGuard
from engine.api.http import NO_PUSH, MoreRoutes, http_app
from engine.api.keys import AccessRules
from engine.api.server.listener import HttpServer
from engine.config.http_config import HttpConfig
from engine.metrics.request_log import RequestLog
from engine.tokenizer import Tokenizer
from lora.sources.allowed_sources import NOWHERE, AllowedSources
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer())
HI: list[Any] = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True, slots=True)
class Response:
    """A response, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


@dataclass(frozen=True, slots=True)
class ApiSession:
    """A client of the application, and the fake behind it."""

    engine: FakeClient
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    async def send(self, method: str, path: str, **kwargs: Any) -> Response:
        async with self.http.request(method, path, **kwargs) as response:
            return Response(response.status, response.headers, await response.read())

    async def post(self, path: str, body: object, **kwargs: Any) -> Response:
        return await self.send("POST", path, json=body, **kwargs)


@asynccontextmanager
async def session(
    engine: Any = None,
    roots: Sequence[Path] = (),
    api_key: str | None = None,
    rules: AccessRules | None = None,
    cors_origins: Sequence[str] = (),
    log: RequestLog | None = None,
    config: HttpConfig | None = None,
    more: Sequence[MoreRoutes] = (),
    sources: AllowedSources = NOWHERE,
    push: PushOptions = NO_PUSH,
) -> AsyncIterator[ApiSession]:
    """Serve `engine`, or a fake of its own, and connect clients to it."""
    engine = engine or FakeClient(TOKENIZER)
    log = log or RequestLog()
    guard = RequestGuard(rules or AccessRules([api_key] if api_key else []), log)
    server = HttpServer(
        http_app(engine, AdapterAdmin(engine, roots, sources), guard, cors_origins, config, more, push),
        config=config,
    )
    url = await server.listen("127.0.0.1", 0)
    plain = openai.DefaultAsyncHttpxClient(verify=False)  # no authorities are read, as nothing is encrypted
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, http_client=plain
    )
    try:
        async with aiohttp.ClientSession(url) as http, client:
            yield ApiSession(engine, http, client)
    finally:
        await server.close()
        log.close()


def events(body: bytes) -> list[Any]:
    """The data of server-sent events; `[DONE]` stays a string."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    datas = [block.removeprefix("data: ") for block in blocks]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]
