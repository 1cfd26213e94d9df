"""Adapters by URL and by template through HTTP, over a real engine: what is answered, told, and never held up."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from engine.async_engine import AsyncEngine
from engine.catalogue.catalogue_file import CatalogueFile
from engine.metrics.telemetry import Telemetry
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft_config import CONFIG_FILE
from lora.sources.allowed_sources import AllowedSources
from lora.sources.source_folders import SourceOptions
from tests.engine.api.session import ApiSession, session
from tests.engine.rig import build
from tests.lora.sources.source_server import SourceServer, source_server, status
from tests.oracles.adapters import base_shape, write_adapter

Visit = Callable[[ApiSession, SourceServer], Awaitable[object]]


def serve(folder: Path, visit: Visit, *, template: bool = True, file: Path | None = None) -> None:
    """Run `visit` with an engine that may fetch from below /adapters of a server, which has `one` and `two` there."""

    async def run(server: SourceServer) -> None:
        url = f"{server.url}/adapters"
        allowed = AllowedSources.of([url], f"{url}/{{name}}" if template else None)
        rig = build(folder, sources=SourceOptions(allowed, folder=folder / "fetched"))
        registry = CatalogueFile(file, 0.0) if file is not None else None
        engine = AsyncEngine(rig.engine, Telemetry(), 8, registry)
        await engine.start()
        try:
            async with session(engine, sources=allowed) as api:
                await visit(api, server)
        finally:
            await engine.close()

    with source_server(folder / "served") as server:
        for number, name in enumerate(("one", "two")):
            write_adapter(server.root / "adapters" / name, base_shape(), 4, number + 50)
        asyncio.run(run(server))


async def ask(api: ApiSession, model: str, chat: bool = False) -> Any:
    if chat:
        messages = [{"role": "user", "content": "a"}]
        return await api.post("/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 2})
    return await api.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 2})


async def load(api: ApiSession, url: str, name: str = "far") -> Any:
    return await api.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": url})


def test_an_adapter_is_loaded_by_url(tmp_path: Path) -> None:
    async def visit(api: ApiSession, server: SourceServer) -> None:
        loaded = await load(api, f"{server.url}/adapters/one")
        assert (loaded.status, loaded.json["root"]) == (200, f"{server.url}/adapters/one")
        assert (await ask(api, "far")).status == 200
        listed = (await api.send("GET", "/v1/adapters/far")).json
        assert listed["source"] == f"{server.url}/adapters/one"

    serve(tmp_path, visit)


def test_what_is_not_allowed_is_a_403_and_is_not_asked(tmp_path: Path) -> None:
    async def visit(api: ApiSession, server: SourceServer) -> None:
        for url in (f"{server.url}/adapters-b/one", f"{server.url}/one", "s3://bucket/one", "file:///etc"):
            refused = await load(api, url)
            assert (refused.status, refused.error["code"]) == (403, "outside_sources"), url
        for url in (f"{server.url}/adapters/../one", f"http://u:hunter2@127.0.0.1/{server.root}"):
            refused = await load(api, url)
            assert refused.status == 400
            assert b"hunter2" not in refused.body
        assert not server.asked

    serve(tmp_path, visit)


def test_no_url_is_loaded_where_none_is_allowed(tmp_path: Path) -> None:
    async def visit() -> None:
        async with session() as api:
            refused = await load(api, "https://host/one")
            assert (refused.status, refused.error["code"]) == (403, "loading_is_off")
            assert "--lora-source" in refused.error["message"]

    asyncio.run(visit())


def test_faults_of_a_source_are_told_as_what_they_are(tmp_path: Path) -> None:
    async def visit(api: ApiSession, server: SourceServer) -> None:
        absent = await load(api, f"{server.url}/adapters/nobody")
        assert (absent.status, absent.error["code"]) == (400, "invalid_adapter")
        server.faults[f"/adapters/one/{WEIGHTS_FILE}"] = status(503)
        assert (await load(api, f"{server.url}/adapters/one")).status == 503

    serve(tmp_path, visit)


def test_an_unknown_name_is_found_by_the_template_at_every_endpoint(tmp_path: Path) -> None:
    async def visit(api: ApiSession, server: SourceServer) -> None:
        assert (await ask(api, "one", chat=True)).status == 200
        assert (await ask(api, "two")).status == 200
        tokens = await api.post("/tokenize", {"model": "two", "prompt": "a"})
        assert tokens.status == 200
        for chat in (True, False, True):
            assert (await ask(api, "nobody", chat)).status == 404
        assert [path for path, _ in server.asked].count(f"/adapters/nobody/{CONFIG_FILE}") == 1

    serve(tmp_path, visit)


def test_requests_for_one_name_fetch_it_once(tmp_path: Path) -> None:
    async def visit(api: ApiSession, server: SourceServer) -> None:
        answers = await asyncio.gather(*(ask(api, "one", chat=number % 2 == 0) for number in range(6)))
        assert {answer.status for answer in answers} == {200}
        assert [path for path, _ in server.asked].count(f"/adapters/one/{WEIGHTS_FILE}") == 1

    serve(tmp_path, visit)


def test_a_source_that_hangs_holds_up_nobody_else(tmp_path: Path) -> None:
    async def visit(api: ApiSession, server: SourceServer) -> None:
        go_on = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def hang(request: web.Request, content: bytes) -> web.StreamResponse:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(go_on.wait(), loop))
            return web.Response(status=404)

        names = [f"slow{number}" for number in range(12)]
        server.faults |= {f"/adapters/{name}/{CONFIG_FILE}": hang for name in names}
        hung = [asyncio.create_task(ask(api, name, chat=True)) for name in names]
        while len(server.asked) < 8:
            await asyncio.sleep(0.01)
        for model in ("base", "low", "high"):
            assert (await ask(api, model, chat=True)).status == 200
        for path in ("/health", "/metrics", "/v1/models"):
            assert (await api.send("GET", path)).status == 200
        go_on.set()
        assert {answer.status for answer in await asyncio.gather(*hung)} == {404}

    serve(tmp_path, visit)


def test_a_name_from_a_url_is_there_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "names.sqlite"

    async def first(api: ApiSession, server: SourceServer) -> None:
        assert (await load(api, f"{server.url}/adapters/one?sig=hunter2")).status == 200
        listed = await api.send("GET", "/v1/adapters/far")
        models = await api.send("GET", "/v1/models")
        assert listed.json["source"] == f"{server.url}/adapters/one?(hidden)"
        assert b"hunter2" not in listed.body + models.body

    serve(tmp_path, first, template=False, file=file)
    registered = CatalogueFile(file, 0.0).read()["far"]
    assert registered.entry.root.endswith("/adapters/one?sig=hunter2")

    async def second(api: ApiSession, server: SourceServer) -> None:
        refused = await ask(api, "far")  # its server was at another port
        assert (refused.status, refused.error["code"]) == (400, "invalid_adapter")

    serve(tmp_path, second, template=False, file=file)
