"""Adapters that are sent as bytes: taken whole or not at all, in one step, and named by their digest."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.api.admin import adapter_push
from engine.api.admin.pushed_files import PushOptions
from engine.api.http import NO_PUSH
from engine.async_engine import AsyncEngine
from engine.catalogue.catalogue_file import CatalogueFile
from engine.metrics.telemetry import Telemetry
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.allowed_roots import AllowedRoots
from lora.format.peft_config import CONFIG_FILE
from tests.engine.api.session import ApiSession, Response, session
from tests.engine.rig import Rig, build
from tests.oracles.adapters import base_shape, write_adapter

Visit = Callable[[ApiSession, Rig], Awaitable[object]]


def serve(
    folder: Path, visit: Visit, *, is_on: bool = True, file: Path | None = None, **options: Any
) -> None:
    """Run `visit` with an engine that takes adapters into folder/pushed."""

    async def run() -> None:
        rig = build(folder)
        roots = AllowedRoots.below([folder / "pushed"])
        registry = CatalogueFile(file, 0.0) if file is not None else None
        engine = AsyncEngine(rig.engine, Telemetry(), 8, registry, roots)
        await engine.start()
        push = PushOptions(folder / "pushed", **options) if is_on else NO_PUSH
        try:
            async with session(engine, push=push) as api:
                await visit(api, rig)
        finally:
            rig.executor.gate.set()
            await engine.close()

    asyncio.run(run())


def files_of(folder: Path, seed: int) -> dict[str, bytes]:
    written = write_adapter(folder / f"made-{seed}", base_shape(), 4, seed)
    return {
        "config": (written / CONFIG_FILE).read_bytes(),
        "weights": (written / WEIGHTS_FILE).read_bytes(),
    }


async def put(api: ApiSession, name: str, parts: dict[str, bytes] | list[tuple[str, bytes]]) -> Response:
    form = aiohttp.FormData()
    for part, content in parts.items() if isinstance(parts, dict) else parts:
        form.add_field(part, BytesIO(content), filename=part)
    return await api.send("PUT", f"/v1/adapters/{name}", data=form)


async def ask(api: ApiSession, model: str) -> int:
    body = {"model": model, "prompt": "a", "max_tokens": 2}
    return (await api.post("/v1/completions", body)).status


async def version_of(api: ApiSession, name: str) -> str | None:
    return (await api.send("GET", f"/v1/adapters/{name}")).json.get("version")


def test_an_adapter_is_sent_and_answers(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        sent = await put(api, "sent", files_of(tmp_path, 60))
        assert sent.status == 200, sent.body
        digest = sent.json["digest"]
        assert (sent.json["version"], len(digest)) == (digest, 64)
        local = rig.engine.store.registry.load("local", tmp_path / "made-60")
        assert digest == local.digest
        assert await ask(api, "sent") == await ask(api, f"sent@{digest[:16]}") == 200
        assert str(tmp_path) not in (await api.send("GET", "/v1/models")).body.decode()

    serve(tmp_path, visit)


def test_a_new_version_takes_the_name_and_the_last_one_goes_with_its_requests(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        first = (await put(api, "sent", files_of(tmp_path, 60))).json["digest"]
        rig.executor.gate.clear()  # a request of the first version does not end
        running = asyncio.create_task(ask(api, "sent"))
        contents = rig.engine.store.contents
        while first not in contents.retained():
            await asyncio.sleep(0.01)
        registry = rig.engine.store.registry
        pushing = asyncio.create_task(put(api, "sent", files_of(tmp_path, 61)))
        second = (await pushing).json["digest"]
        assert registry.resolve("sent").digest == second != first
        assert contents.layout(first) is not None
        assert (await api.send("GET", f"/v1/adapters/sent@{first[:16]}")).status == 404
        assert await version_of(api, f"sent@{second[:16]}") == second
        rig.executor.gate.set()
        assert await running == 200
        while contents.layout(first) is not None:
            await asyncio.sleep(0.01)
            contents.advance()
            assert await ask(api, "low") == 200

    serve(tmp_path, visit)


def test_what_cannot_be_served_changes_nothing(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        good = files_of(tmp_path, 60)
        digest = (await put(api, "sent", good)).json["digest"]
        for parts, status in (
            (good | {"weights": good["weights"][:-9]}, 400),
            (good | {"config": b"{}"}, 400),
            ({"config": good["config"]}, 400),
            ({"weights": good["weights"]}, 400),
            (good | {"pickle": b"x"}, 400),
            ([*good.items(), ("weights", b"x")], 400),
            (good | {"config": b" " * ((1 << 20) + 1)}, 413),
            (good | {"weights": b"\0" * 300_000}, 413),
        ):
            refused = await put(api, "sent", parts)
            assert refused.status == status, refused.body
            assert str(tmp_path) not in refused.body.decode()
        assert await version_of(api, "sent") == digest
        while len(list((tmp_path / "pushed").iterdir())) > 1:
            await asyncio.sleep(0.01)

    serve(tmp_path, visit, most_bytes=200_000)


def test_what_is_no_form_is_refused(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        for kind, body, status in (
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"x", 400),
            ("multipart/form-data; boundary=b", b"x", 400),
            ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n", 400),
            ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\nx', 400),
        ):  # fmt: skip
            answer = await api.send("PUT", "/v1/adapters/sent", data=body, headers={"Content-Type": kind})
            assert answer.status == status, (kind, body, answer.body)
        assert await ask(api, "sent") == 404

    serve(tmp_path, visit)


@pytest.mark.parametrize("name", ["base", "a@b", "a%20b", "x" * 120, "..%2Fup", "a//b"])
def test_a_name_that_no_adapter_may_have_is_refused(tmp_path: Path, name: str) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        answer = await put(api, name, files_of(tmp_path, 60))
        assert answer.status in (400, 404), answer.body
        assert not (tmp_path / "pushed").exists()

    serve(tmp_path, visit)


def test_nothing_is_taken_unless_an_operator_says_where_to(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        answer = await put(api, "sent", files_of(tmp_path, 60))
        assert (answer.status, answer.error["code"]) == (403, "pushing_is_off")

    serve(tmp_path, visit, is_on=False)


def test_a_sender_that_stops_is_given_up(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        async def body() -> Any:
            yield b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n{'
            await asyncio.sleep(60)

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await api.send("PUT", "/v1/adapters/sent", data=body(), headers=headers)
        assert answer.status == 408
        while list((tmp_path / "pushed").iterdir()):
            await asyncio.sleep(0.01)

    serve(tmp_path, visit, timeout_s=0.3)


def test_versions_sent_at_once_end_as_one(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        made = [files_of(tmp_path, seed) for seed in (60, 61, 62)]
        answers = await asyncio.gather(*(put(api, "sent", parts) for parts in made))
        assert {answer.status for answer in answers} == {200}
        digest = await version_of(api, "sent")
        listed = (await api.send("GET", "/v1/adapters")).json["data"]
        versions = [each["name"] for each in listed if each["name"].startswith("sent@")]
        assert versions == [f"sent@{str(digest)[:16]}"]

    serve(tmp_path, visit)


def test_files_of_what_no_name_means_go_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_push, "_KEPT_S", 0.0)

    async def visit(api: ApiSession, rig: Rig) -> None:
        for seed in (60, 61):
            assert (await put(api, "sent", files_of(tmp_path, seed))).status == 200
        while len(list((tmp_path / "pushed").iterdir())) > 1:
            await asyncio.sleep(0.01)
        assert await ask(api, "sent") == 200
        await api.post("/v1/adapters/alias", {"name": "kept", "target": "sent"})
        assert (await api.send("DELETE", "/v1/adapters/sent")).status == 200
        assert await ask(api, "kept") == 200
        assert len(list((tmp_path / "pushed").iterdir())) == 1
        names = [each["name"] for each in (await api.send("GET", "/v1/adapters")).json["data"]]
        assert not any(name.startswith("sent") for name in names)
        assert (await api.send("DELETE", "/v1/adapters/kept")).status == 200
        while list((tmp_path / "pushed").iterdir()):
            await asyncio.sleep(0.01)

    serve(tmp_path, visit)


def test_a_version_to_which_an_alias_leads_by_share_stays_when_the_next_one_is_sent(tmp_path: Path) -> None:
    async def visit(api: ApiSession, rig: Rig) -> None:
        assert (await put(api, "sent", files_of(tmp_path, 60))).status == 200
        old = f"sent@{str(await version_of(api, 'sent'))[:16]}"
        shares = [{"name": old, "share": 0.9}, {"name": "low", "share": 0.1}]
        made = await api.post("/v1/adapters/alias", {"name": "support", "targets": shares})
        assert made.status == 200
        assert (await put(api, "sent", files_of(tmp_path, 61))).status == 200
        assert await ask(api, old) == await ask(api, "support") == 200
        assert await version_of(api, old) != await version_of(api, "sent")

    serve(tmp_path, visit)


def test_what_was_sent_is_there_after_a_restart(tmp_path: Path) -> None:
    digests: list[str | None] = []

    async def first(api: ApiSession, rig: Rig) -> None:
        digests.append((await put(api, "sent", files_of(tmp_path, 60))).json["digest"])

    async def second(api: ApiSession, rig: Rig) -> None:
        assert await ask(api, "sent") == 200
        digests.append(await version_of(api, "sent"))

    for visit in (first, second):
        serve(tmp_path, visit, file=tmp_path / "names.sqlite")
    assert digests[0] == digests[1]


def test_a_disk_that_hangs_holds_up_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    opened = Path.open

    def hang(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == WEIGHTS_FILE:
            go_on.wait(30)
        return opened(path, *args, **kwargs)

    async def visit(api: ApiSession, rig: Rig) -> None:
        parts = files_of(tmp_path, 60)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", hang)
            pushing = asyncio.create_task(put(api, "sent", parts))
            await asyncio.sleep(0.1)
            assert await ask(api, "low") == 200
            go_on.set()
            assert (await pushing).status == 200

    serve(tmp_path, visit)
