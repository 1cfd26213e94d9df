"""The real application on a loopback port that the system picks, over a fake node."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
from aiohttp import web

from engine.api.adapters import AdapterAdmin
from engine.api.http import http_app, http_runner
from engine.tokenizer import Tokenizer
from tests.fakes.node import FakeNode, byte_tokenizer

CODEC = Tokenizer(byte_tokenizer())
HI: list[Any] = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True, slots=True)
class Answer:
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
class Door:
    """A client of the application, and the fake behind it."""

    node: FakeNode
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    async def ask(self, method: str, path: str, **kwargs: Any) -> Answer:
        async with self.http.request(method, path, **kwargs) as response:
            return Answer(response.status, response.headers, await response.read())

    async def post(self, path: str, body: object, **kwargs: Any) -> Answer:
        return await self.ask("POST", path, json=body, **kwargs)


@asynccontextmanager
async def door(
    node: FakeNode | None = None, roots: Sequence[Path] = (), api_key: str | None = None
) -> AsyncIterator[Door]:
    node = node or FakeNode(CODEC)
    runner = http_runner(http_app(node, AdapterAdmin(node, roots), api_key))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0)
    try:
        async with aiohttp.ClientSession(url) as session, client:
            yield Door(node, session, client)
    finally:
        await runner.cleanup()


def events(body: bytes) -> list[Any]:
    """The data of server-sent events; `[DONE]` stays a string."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    datas = [block.removeprefix("data: ") for block in blocks]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]
