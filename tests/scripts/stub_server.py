"""A stand-in for the server under load: the routes, streams and metrics that the load run touches, and nothing
behind them. Its faults are fields, so that a test can ask whether the load run notices each."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

BASE, ADAPTERS = "base", ("a00-r8", "a01-r16")
MAX_MODEL_LEN = 256


@dataclass(slots=True)
class StubServer:
    """`leaks` keeps a sequence whose client left; `accepts_all` answers malformed requests; `ends_early` forgets
    the end mark of every stream; `stalls` is how often its event loop says that it came late."""

    leaks: bool = False
    accepts_all: bool = False
    ends_early: bool = False
    stalls: int | None = None
    running: int = 0
    seen: int = 0

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[str, None]:
        """Its URL, on a free port of the loopback interface."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self.models),
                web.get("/metrics", self.metrics),
                web.post("/v1/completions", self.completions),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def models(self, request: web.Request) -> web.Response:
        entries = [{"id": BASE, "parent": None, "root": None, "max_model_len": MAX_MODEL_LEN}]
        return web.json_response({"data": [*entries, *({"id": name, "parent": BASE} for name in ADAPTERS)]})

    async def metrics(self, request: web.Request) -> web.Response:
        lines = (
            "# HELP loraserve_sequences_running Sequences that run.",
            f"loraserve_sequences_running {self.running:.1f}",
            "loraserve_sequences_waiting 0.0",
            f'loraserve_kv_blocks{{state="used"}} {2 * self.running:.1f}',
            'loraserve_kv_blocks{state="cached"} 7.0',
        )
        told = (
            [f'loraserve_event_loop_stalls_total{{over="20ms"}} {self.stalls}']
            if self.stalls is not None
            else []
        )
        return web.Response(text="\n".join([*lines, *told]))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.seen += 1
        body = self.parse(await request.read())
        if body is None and not self.accepts_all:
            return web.json_response({"error": {"message": "no"}}, status=400)
        self.running += 1
        finished = False
        try:
            response = await self.stream(request, 4 if body is None else body["max_tokens"])
            finished = True
            return response
        finally:
            self.running -= finished or not self.leaks

    def parse(self, raw: bytes) -> dict[str, Any] | None:
        """The body if it is sound."""
        try:
            body = json.loads(raw)
            sound = (
                body["model"] in (BASE, *ADAPTERS)
                and 1 <= len(body["prompt"]) < MAX_MODEL_LEN
                and isinstance(body["max_tokens"], int)
                and body["temperature"] >= 0
            )
        except (ValueError, KeyError):
            return None
        return body if sound else None

    async def stream(self, request: web.Request, tokens: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(tokens):
            await asyncio.sleep(0)
            await self.send(response, {"choices": [{"index": 0, "text": "x"}], "usage": None})
        await self.send(response, {"choices": [], "usage": {"completion_tokens": tokens}})
        if not self.ends_early:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
