"""Adapters by path: only from the folders that the operator allowed, whatever the path looks like."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora.adapter import AdapterEntry, AdapterRef
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from tests.engine.api.session import TOKENIZER, session
from tests.fakes.engine_client import FakeClient

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("allowed/new", "allowed/empty", "secret/stolen"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("allowed/new", "secret/stolen"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret" / "stolen")
    return tmp_path / "allowed"


async def test_an_adapter_comes_and_goes(root: Path) -> None:
    async with session(roots=[root]) as api:
        for path in (str(root / "new"), "new", "./empty/../new"):
            loaded = await api.post(LOAD, {"lora_name": "new", "lora_path": path})
            assert (loaded.status, loaded.json["id"], loaded.json["parent"]) == (200, "new", "base")
            assert loaded.json["root"] == "new"
            assert (await api.openai.completions.create(model="new", prompt="hi")).model == "new"
            assert (await api.post(UNLOAD, {"lora_name": "new"})).status == 200
            assert (await api.post("/v1/completions", {"model": "new", "prompt": "hi"})).status == 404
        assert (await api.post(UNLOAD, {"lora_name": "new"})).error["code"] == "model_not_found"


async def test_a_name_that_is_there_is_loaded_anew_unless_the_client_says_not_to(root: Path) -> None:
    async with session(roots=[root]) as api:
        body = {"lora_name": "new", "lora_path": "new"}
        for in_place in (False, None, True):
            assert (await api.post(LOAD, body | {"load_inplace": in_place})).status == 200
        assert (await api.post(LOAD, body)).status == 200
        error = (await api.post(LOAD, body | {"load_inplace": False})).error
        assert (error["param"], error["code"]) == ("lora_name", "adapter_exists")
        assert (await api.post(LOAD, body | {"base_model_name": "base"})).status == 200
        assert (await api.post(LOAD, body | {"base_model_name": "b"})).error["param"] == "base_model_name"


async def test_no_path_leads_outside(root: Path) -> None:
    async with session(roots=[root]) as api:
        outside = [
            "../secret/stolen",
            str(root.parent / "secret" / "stolen"),
            "link",
            "new/../../secret/stolen",
        ]
        for path in (*outside, "/", "..", ".", "/no/such/place"):
            response = await api.post(LOAD, {"lora_name": "x", "lora_path": path})
            assert (response.status, response.error["param"]) == (403, "lora_path"), path
        assert [adapter.name for adapter in api.engine.adapters()] == ["poet", "team/coder"]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"])
async def test_no_file_of_a_folder_leads_outside(file: str, root: Path) -> None:
    (root / "empty" / file).symlink_to(root.parent / "secret" / "stolen" / "adapter_config.json")
    async with session(roots=[root]) as api:
        response = await api.post(LOAD, {"lora_name": "x", "lora_path": "empty"})
        assert (response.status, response.error["code"]) == (403, "outside_roots")


async def test_who_reads_the_files_is_told_the_roots(root: Path) -> None:
    given: list[AllowedRoots] = []

    class Noting(FakeClient):
        async def load_adapter(
            self, name: str, folder: Path, replaces: bool = True, roots: AllowedRoots = ANYWHERE
        ) -> AdapterRef:
            given.append(roots)
            return await super().load_adapter(name, folder, replaces, roots)

    (root.parent / "way").symlink_to(root)
    async with session(Noting(TOKENIZER), roots=[root.parent / "way", root / "empty"]) as api:
        assert (await api.post(LOAD, {"lora_name": "x", "lora_path": "new"})).status == 200
    assert given == [AllowedRoots((root, root / "empty"))]


async def test_files_may_be_links_to_below_a_root(root: Path) -> None:
    (root / "empty" / "adapter_config.json").symlink_to(root / "new" / "adapter_config.json")
    async with session(roots=[root]) as api:
        assert (await api.post(LOAD, {"lora_name": "x", "lora_path": "empty"})).status == 200


@pytest.mark.parametrize("path", ["x" * 300, "loop", "new/" + "y" * 3000])
async def test_a_path_that_cannot_be_followed_is_refused(path: str, root: Path) -> None:
    (root / "loop").symlink_to("loop")
    async with session(roots=[root]) as api:
        response = await api.post(LOAD, {"lora_name": "x", "lora_path": path})
        assert (response.status, response.error["param"]) == (400, "lora_path")
        assert (await api.post(LOAD, {"lora_name": "x", "lora_path": "\ud800"})).status == 400


async def test_what_is_no_adapter_is_refused_with_the_reason(root: Path) -> None:
    async with session(roots=[root]) as api:
        for path, reason in (
            ("empty", "no adapter_config.json"),
            ("missing", "is no folder"),
            ("", "give 1 to"),
        ):
            response = await api.post(LOAD, {"lora_name": "x", "lora_path": path})
            assert response.status == 400
            assert reason in response.error["message"]
        assert (await api.post(LOAD, {"lora_name": "x", "lora_path": "a\u0000b"})).status == 400
        assert (await api.post(LOAD, {"lora_name": "x"})).error["param"] == "lora_path"


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "a b", "..", "a/../b", "a\n", "é", "x" * 129, "base", "<script>", "."]
)
async def test_bad_names_are_refused(name: str, root: Path) -> None:
    async with session(roots=[root]) as api:
        response = await api.post(LOAD, {"lora_name": name, "lora_path": "new"})
        assert (response.status, response.error["param"]) == (400, "lora_name")


@pytest.mark.parametrize("name", ["a", "team/a-1_b.c", "org/name@v1:2+x", ".hidden"])
async def test_good_names_are_accepted(name: str, root: Path) -> None:
    async with session(roots=[root]) as api:
        assert (await api.post(LOAD, {"lora_name": name, "lora_path": "new"})).status == 200


async def test_without_roots_nothing_is_loaded_by_path(root: Path) -> None:
    async with session() as api:
        response = await api.post(LOAD, {"lora_name": "x", "lora_path": str(root / "new")})
        assert (response.status, response.error["code"]) == (403, "loading_is_off")


async def test_a_load_that_worked_is_told_so_though_the_name_is_gone_again(root: Path) -> None:
    class Unloading(FakeClient):
        async def load_adapter(
            self, name: str, folder: Path, replaces: bool = True, roots: AllowedRoots = ANYWHERE
        ) -> AdapterRef:
            ref = await super().load_adapter(name, folder, replaces, roots)
            await self.unload_adapter(name)
            return ref

    async with session(Unloading(TOKENIZER), roots=[root]) as api:
        loaded = await api.post(LOAD, {"lora_name": "new", "lora_path": "new"})
        assert (loaded.status, loaded.json["id"], loaded.json["root"]) == (200, "new", "new")
        assert (await api.post(UNLOAD, {"lora_name": "new"})).status == 404


async def test_every_name_of_the_base_is_listed_and_answers() -> None:
    client = FakeClient(TOKENIZER)
    client.model_names = ("base", "org/base")
    async with session(client) as api:
        listed = (await api.send("GET", "/v1/models")).json["data"]
        assert [(model["id"], model["parent"]) for model in listed[:2]] == [
            ("base", None),
            ("org/base", None),
        ]
        assert (await api.send("GET", "/v1/models/org/base")).json["id"] == "org/base"
        answer = await api.post("/v1/completions", {"model": "org/base", "prompt": "hi"})
        assert (answer.status, answer.json["model"]) == (200, "org/base")


async def test_no_path_of_the_machine_is_told(root: Path) -> None:
    async with session(roots=[root]) as api:
        told = [
            (await api.post(LOAD, {"lora_name": "x", "lora_path": path})).body.decode()
            for path in ("new", str(root / "new"), "empty", "missing")
        ]
        told.append((await api.send("GET", "/v1/models")).body.decode())
        assert [text for text in told if str(root) in text or str(root.parent) in text or '"/' in text] == []


async def test_a_load_tells_at_once_whether_the_adapter_changes_anything(root: Path) -> None:
    class Knowing(FakeClient):
        def adapters(self) -> tuple[AdapterEntry, ...]:
            return tuple(replace(entry, inertia="all zero") for entry in super().adapters())

    async with session(Knowing(TOKENIZER), roots=[root]) as api:
        loaded = await api.post(LOAD, {"lora_name": "new", "lora_path": "new"})
        assert loaded.json["changes_output"] is False
        assert (await api.send("GET", "/v1/models/new")).json["changes_output"] is False


async def test_a_load_tells_what_an_activated_lora_acts_from(root: Path) -> None:
    class Activated(FakeClient):
        def adapters(self) -> tuple[AdapterEntry, ...]:
            entries = super().adapters()
            return tuple(
                replace(each, ref=each.ref and replace(each.ref, invocation=(5, 6))) for each in entries
            )

    for client, told in ((Activated(TOKENIZER), [5, 6]), (FakeClient(TOKENIZER), [])):
        async with session(client, roots=[root]) as api:
            loaded = await api.post(LOAD, {"lora_name": "new", "lora_path": "new"})
            assert loaded.json["invocation"] == told
            assert (await api.send("GET", "/v1/models/new")).json["invocation"] == told
