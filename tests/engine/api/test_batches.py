"""Files and batches over HTTP: each line one result, whatever ends the server; nobody sees another's."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.api.keys import AccessRules
from engine.api.openapi.document import document
from engine.batches.batch_operations import DESCRIPTION
from engine.batches.batch_routes import BatchRoutes
from engine.batches.batch_store import BatchStore
from engine.config.batches_config import BatchesConfig
from engine.errors import EngineStopped, InvalidConfig, Overloaded
from tests.engine.api.session import TOKENIZER, ApiSession, session
from tests.fakes.engine_client import FakeClient

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if url == CHAT else {"prompt": "hi"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "poet"} | asked | body}


def written(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


@asynccontextmanager
async def served(
    folder: Path, engine: FakeClient | None = None, rules: AccessRules | None = None, **config: int
) -> AsyncIterator[ApiSession]:
    engine = engine or FakeClient(TOKENIZER)
    routes = BatchRoutes(engine, BatchesConfig(batch_dir=folder, **config), body_timeout_s=0.5)
    async with session(engine, rules=rules, more=[routes]) as api:
        await routes.start()
        try:
            yield api
        finally:
            await routes.close()


async def begun(
    api: ApiSession, lines: list[dict[str, Any]], endpoint: Any = COMPLETIONS
) -> openai.types.Batch:
    sent = await api.openai.files.create(file=("in.jsonl", written(lines)), purpose="batch")
    return await api.openai.batches.create(
        input_file_id=sent.id, endpoint=endpoint, completion_window="24h", metadata={"run": "1"}
    )


async def until(found: Callable[[], Awaitable[Any]]) -> Any:
    """The first value that is true; the test's own bound ends what never is."""
    while not (value := await found()):
        await asyncio.sleep(0.01)
    return value


async def ended(api: ApiSession, batch_id: str) -> openai.types.Batch:
    async def look() -> openai.types.Batch | None:
        batch = await api.openai.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "cancelled", "expired") else None

    return await until(look)


async def results(api: ApiSession, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = (await api.openai.files.content(file_id)).text
    found = [json.loads(each) for each in text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


async def test_the_openai_client_has_a_file_answered(tmp_path: Path) -> None:
    lines = [line("a"), line("b", max_tokens=4), line("c", model="nope"), line("d", url=CHAT)]
    async with served(tmp_path) as api:
        batch = await begun(api, lines)
        assert (batch.object, batch.metadata) == ("batch", {"run": "1"})
        done = await ended(api, batch.id)
        counts = done.request_counts
        assert counts is not None
        assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 4, 2, 2)
        answers = await results(api, done.output_file_id)
        assert {key: each["response"]["body"]["choices"][0]["text"] for key, each in answers.items()} == {
            "a": "poet heard hi",
            "b": "poet",
        }
        errors = await results(api, done.error_file_id)
        assert {key: each["error"]["code"] for key, each in errors.items()} == {
            "c": "model_not_found",
            "d": "mismatched_url",
        }
        assert errors["c"]["response"]["status_code"] == 404
        listed = [each.id async for each in await api.openai.batches.list()]
        assert listed == [batch.id]
        files = [each async for each in await api.openai.files.list()]
        assert [each.purpose for each in files].count("batch_output") == 2
        assert {each.id for each in files} == {done.input_file_id, done.output_file_id, done.error_file_id}


async def gauges(api: ApiSession) -> dict[str, float]:
    """What metrics tell of batches, by the state or end where there is one."""
    text = (await api.send("GET", "/metrics")).body.decode()
    return {
        next(iter(sample.labels.values()), "left"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name.startswith("loraserve_batch")
    }


async def test_metrics_and_the_page_tell_of_batches_that_wait_run_and_have_ended(tmp_path: Path) -> None:
    engine = FakeClient(TOKENIZER)
    none = dict.fromkeys(
        ("queued", "running", "left", "completed", "failed", "expired", "cancelled"), 0
    )  # fmt: skip
    async with served(tmp_path, engine) as api:

        async def is_told(**changes: int) -> bool:
            return await gauges(api) == none | changes

        assert await is_told()
        engine.gate.clear()
        batches = [await begun(api, [line("a"), line("b")]) for _ in range(6)]
        await until(lambda: is_told(queued=2, running=4, left=8))
        async with api.http.get("/page/events") as events:
            data = (await events.content.readuntil(b"\n\n")).decode().splitlines()[2]
        tables = json.loads(data.removeprefix("data: "))["tables"]
        assert tables["batches"][""] == none | {"queued": 2, "running": 4, "left": 8}
        await api.openai.batches.cancel(batches[0].id)
        await begun(api, [])
        engine.gate.set()
        await until(lambda: is_told(completed=5, cancelled=1, failed=1))


async def test_lines_wait_behind_other_requests_and_are_counted_for_their_key(tmp_path: Path) -> None:
    engine = FakeClient(TOKENIZER)
    async with served(tmp_path, engine, AccessRules(["one", "two"])) as api:
        api.openai.api_key = "one"
        batch = await begun(api, [line("a")])
        assert (await ended(api, batch.id)).status == "completed"
        await api.openai.completions.create(model="poet", prompt="hi")
        assert engine.priorities == [1, 0]
        assert engine.tenants[0] == engine.tenants[1] != ""


async def test_nobody_sees_what_another_key_has_sent(tmp_path: Path) -> None:
    async with served(tmp_path, rules=AccessRules(["one", "two"])) as api:
        api.openai.api_key = "one"
        batch = await begun(api, [line("a")])
        done = await ended(api, batch.id)
        api.openai.api_key = "two"
        for look in (
            lambda: api.openai.batches.retrieve(batch.id),
            lambda: api.openai.batches.cancel(batch.id),
            lambda: api.openai.files.retrieve(batch.input_file_id),
            lambda: api.openai.files.content(str(done.output_file_id)),
            lambda: api.openai.files.delete(batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                await look()
        with pytest.raises(openai.BadRequestError, match="there is no file"):
            await api.openai.batches.create(
                input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h"
            )
        assert [each async for each in await api.openai.files.list()] == []
        assert [each async for each in await api.openai.batches.list()] == []


async def test_a_server_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    """The first answers two lines and hangs on the third; the second has every line once."""
    lines = [line(f"l{number}") for number in range(6)]
    first = FakeClient(TOKENIZER)
    async with served(tmp_path, first, batch_in_flight=1) as api:
        batch = await begun(api, lines)

        async def two_are_done() -> bool:
            counts = (await api.openai.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed == 2

        first.says = _hangs_after(first, 2)
        await until(two_are_done)
        await first.gate_reached.wait()
    assert first.live == {}
    second = FakeClient(TOKENIZER)
    async with served(tmp_path, second) as api:
        done = await ended(api, batch.id)
        assert done.status == "completed"
        assert (await results(api, done.output_file_id)).keys() == {each["custom_id"] for each in lines}
        assert len(second.submitted) == 4


def _hangs_after(engine: FakeClient, count: int) -> Callable[[str, str], str]:
    said = engine.says

    def says(model: str, prompt: str) -> str:
        if len(engine.submitted) > count:
            engine.gate.clear()
        return said(model, prompt)

    return says


async def test_what_is_refused_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.batches.batch_run._LEAST_WAIT_S", 0.01)
    monkeypatch.setattr("engine.batches.batch_run._MOST_WAIT_S", 0.01)
    engine = FakeClient(TOKENIZER)
    engine.refusal = Overloaded(9, 9, 1)
    async with served(tmp_path, engine) as api:
        batch = await begun(api, [line("a")])
        await asyncio.sleep(0.1)
        assert (await api.openai.batches.retrieve(batch.id)).status == "in_progress"
        engine.refusal = None
        done = await ended(api, batch.id)
        assert (await results(api, done.output_file_id)).keys() == {"a"}


async def test_a_cancelled_batch_keeps_what_is_answered(tmp_path: Path) -> None:
    engine = FakeClient(TOKENIZER)
    async with served(tmp_path, engine, batch_in_flight=1) as api:
        said, engine.says = engine.says, _hangs_after(engine, 1)
        batch = await begun(api, [line("a"), line("b"), line("c")])
        await engine.gate_reached.wait()
        assert (await api.openai.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(api, batch.id)
        counts = done.request_counts
        assert counts is not None
        assert (done.status, counts.total, counts.completed) == ("cancelled", 3, 1)
        assert (await results(api, done.output_file_id)).keys() == {"a"}
        assert engine.live == {}
        with pytest.raises(openai.ConflictError, match="is cancelled"):
            await api.openai.batches.cancel(batch.id)
        engine.says = said
        engine.gate.set()
        other = await begun(api, [line("z")])
        assert (await ended(api, other.id)).status == "completed", "no slot was lost"


async def test_a_batch_that_is_not_done_in_its_window_expires(tmp_path: Path) -> None:
    engine = FakeClient(TOKENIZER)
    engine.gate.clear()
    async with served(tmp_path, engine) as api:
        batch = await begun(api, [line("a")])
        await engine.gate_reached.wait()
    store = BatchStore(tmp_path)
    ((owner, kept),) = store.unfinished()
    store.put_batch(owner, msgspec.structs.replace(kept, expires_at=kept.created_at - 1))
    store.close()
    async with served(tmp_path) as api:
        done = await ended(api, batch.id)
        assert (done.status, done.output_file_id) == ("expired", None)


async def test_an_engine_that_stops_leaves_the_batch_to_the_next_server(tmp_path: Path) -> None:
    engine = FakeClient(TOKENIZER)
    engine.refusal = EngineStopped("it broke")
    async with served(tmp_path, engine) as api:
        batch = await begun(api, [line("a")])
        await asyncio.sleep(0.05)
        assert (await api.openai.batches.retrieve(batch.id)).status == "in_progress"
    async with served(tmp_path) as api:
        assert (await ended(api, batch.id)).status == "completed"


@pytest.mark.parametrize(
    ("content", "told"), [(b"", "no lines"), (b"\n\n", "no lines"), ("x".encode("utf-16"), "UTF-16")]
)
async def test_a_file_without_lines_fails_the_batch(tmp_path: Path, content: bytes, told: str) -> None:
    async with served(tmp_path) as api:
        sent = await api.openai.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await api.openai.batches.create(
            input_file_id=sent.id, endpoint=COMPLETIONS, completion_window="24h"
        )
        done = await ended(api, batch.id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert told in str(done.errors.data[0].message)
        assert str(tmp_path) not in str(done.errors)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "1e3h"}, "completion_window"),
        ({"input_file_id": "file-nope"}, "input_file_id"),
        ({"input_file_id": "../batches.sqlite"}, "input_file_id"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_a_batch_that_cannot_be_names_the_field(
    tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    async with served(tmp_path) as api:
        sent = await api.openai.files.create(file=("in.jsonl", b"{}"), purpose="batch")
        asked = {"input_file_id": sent.id, "endpoint": COMPLETIONS, "completion_window": "24h"} | body
        response = await api.post("/v1/batches", asked)
        assert (response.status, response.error["param"]) == (400, param)


def form(*fields: tuple[str, Any, str | None]) -> aiohttp.FormData:
    made = aiohttp.FormData(default_to_multipart=True)
    for name, value, filename in fields:
        made.add_field(name, value, filename=filename)
    return made


FILE, PURPOSE = ("file", b"{}\n", "in.jsonl"), ("purpose", "batch", None)
BAD_FORMS: dict[str, tuple[tuple[tuple[str, Any, str | None], ...], int, str | None]] = {
    "no file": ((PURPOSE,), 400, "file"),
    "no purpose": ((FILE,), 400, "purpose"),
    "another purpose": ((FILE, ("purpose", "fine-tune", None)), 400, "purpose"),
    "two files": ((FILE, FILE, PURPOSE), 400, "file"),
    "an unknown field": (
        (FILE, PURPOSE, ("expires_after[seconds]", "60", None)),
        400,
        "expires_after[seconds]",
    ),
    "no filename": ((("file", b"{}", ""), PURPOSE), 400, "file"),
    "too long a filename": ((("file", b"{}", "a" * 256), PURPOSE), 400, "file"),
    "too large a file": ((("file", b"x" * 2000, "in.jsonl"), PURPOSE), 413, "file"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
async def test_a_form_that_cannot_be_taken_leaves_nothing(tmp_path: Path, name: str) -> None:
    fields, status, param = BAD_FORMS[name]
    async with served(tmp_path, batch_file_bytes=1000) as api:
        response = await api.send("POST", "/v1/files", data=form(*fields))
        assert (response.status, response.error["param"]) == (status, param)
        assert list((tmp_path / "uploads").iterdir()) == []
        assert list((tmp_path / "contents").iterdir()) == []
        assert (await api.send("POST", "/v1/files", data=form(PURPOSE, FILE))).status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"Content-Type": "application/json"}, 415),
        (b"", {"Content-Type": "multipart/form-data"}, 400),
        (b"nothing of the kind", {"Content-Type": "multipart/form-data; boundary=b"}, 400),
        (b"--b\r\n\r\nx", {"Content-Type": "multipart/form-data; boundary=b"}, 400),
        (b"--b\r\n" + b"a: b\r\n" * 400, {"Content-Type": "multipart/form-data; boundary=b"}, 400),
        (b"--b\r\na: " + b"b" * 20000, {"Content-Type": "multipart/form-data; boundary=b"}, 400),
        (b"--b\r\n", {"Content-Type": "multipart/form-data; boundary=" + "b" * 100}, 400),
    ],
)
async def test_what_is_no_multipart_body_is_refused(
    tmp_path: Path, body: bytes, headers: dict[str, str], status: int
) -> None:
    async with served(tmp_path) as api:
        assert (await api.send("POST", "/v1/files", data=body, headers=headers)).status == status
        assert list((tmp_path / "uploads").iterdir()) == []


WHOLE = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\n\r\n--b--\r\n'
)
SPOILT_BY = (
    b"\r\n", b"--b", b"--b--", b'name="_charset_"', b"filename*=utf-8''%ff", b"Content-Length: -1\r\n",
    b"Content-Encoding: gzip\r\n", b"Content-Type: multipart/mixed; boundary=c\r\n", b"\x00", b"\xff", b": \r\n",
)  # fmt: skip


async def test_a_spoilt_form_is_never_an_error_of_the_server(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    chance, statuses = Random(7), set[int]()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with served(tmp_path) as api:
        for _ in range(200):
            body = bytearray(WHOLE)
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(body))
                if chance.random() < 0.5:
                    body[at:at] = chance.choice(SPOILT_BY)
                else:
                    del body[at : at + chance.randint(1, 30)]
            statuses.add((await api.send("POST", "/v1/files", data=bytes(body), headers=headers)).status)
            assert list((tmp_path / "uploads").iterdir()) == []
    assert statuses == {200, 400}
    assert [str(each.message) for each in recwarn if "aiohttp" in each.filename] == []


async def test_a_file_that_stops_coming_is_given_up(tmp_path: Path) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
        await asyncio.sleep(5)

    async with served(tmp_path) as api:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        response = await api.send("POST", "/v1/files", data=slow(), headers=headers)
        assert (response.status, response.error["code"]) == (408, "timeout")
        assert list((tmp_path / "uploads").iterdir()) == []


async def test_files_together_are_bounded(tmp_path: Path) -> None:
    async with served(tmp_path, batch_dir_bytes=5) as api:
        sent = await api.openai.files.create(file=("a", b"1234"), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="delete some first"):
            await api.openai.files.create(file=("b", b"12"), purpose="batch")
        assert (await api.openai.files.delete(sent.id)).deleted
        await api.openai.files.create(file=("b", b"12"), purpose="batch")


async def test_files_that_come_at_once_are_bounded_together(tmp_path: Path) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 900_000
        await asyncio.sleep(0.3)
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with served(tmp_path, batch_dir_bytes=1_500_000) as api:
        sent = [api.send("POST", "/v1/files", data=slow(), headers=headers) for _ in range(2)]
        assert 413 in {each.status for each in await asyncio.gather(*sent)}


async def test_a_file_that_a_batch_reads_is_not_deleted(tmp_path: Path) -> None:
    engine = FakeClient(TOKENIZER)
    engine.gate.clear()
    async with served(tmp_path, engine) as api:
        batch = await begun(api, [line("a")])
        with pytest.raises(openai.ConflictError, match="still reads"):
            await api.openai.files.delete(batch.input_file_id)
        engine.gate.set()
        await ended(api, batch.id)
        assert (await api.openai.files.delete(batch.input_file_id)).deleted


async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        sent = [(await api.openai.files.create(file=("a", b"1"), purpose="batch")).id for _ in range(5)]
        pages = [each.id async for each in await api.openai.files.list(limit=2, order="asc")]
        assert pages == sent
        for query in ("limit=0", "limit=x", "after=nope", "order=up", "surprise=1"):
            assert (await api.send("GET", f"/v1/files?{query}")).status == 400
        assert (await api.send("GET", "/v1/batches?limit=101")).status == 400


def test_one_server_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    with pytest.raises(InvalidConfig, match="another server uses it"):
        BatchStore(tmp_path)
    store.close()
    (tmp_path / "contents" / "file-torn").write_text("of a process that was killed")
    BatchStore(tmp_path).close()
    assert list((tmp_path / "contents").iterdir()) == []


async def test_the_routes_are_described(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        told = (await api.send("GET", "/openapi.json")).json
        sent = await api.openai.files.create(file=("a", b"1"), purpose="batch")
        one = (await api.send("GET", f"/v1/files/{sent.id}")).json
    assert told == json.loads(json.dumps(document(told["info"]["version"], DESCRIPTION)))
    assert {"/v1/files", "/v1/batches"} <= told["paths"].keys()
    assert set(told["components"]["schemas"]["FileObject"]["properties"]) == set(one)
