"""A large body is decoded in a process of its own, and means there what it means here."""

import io
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from engine.api import schema
from engine.api.bodies.body_parser import LARGE_BODY_BYTES, BodyProcess
from engine.api.bodies.body_readers import READERS
from engine.api.errors import ApiError, as_api_error
from engine.config.http_config import HttpConfig
from engine.errors import InvalidAdapter, NotInTime
from engine.text.worker_process import WorkerProcess
from engine.tokenizer import Tokenizer
from lora.format.companions import Companions
from tests.engine.api.session import TOKENIZER, session
from tests.fakes.engine_client import FakeClient

CONFIG = HttpConfig(max_body_bytes=32 << 20)
LONG = "word \U0001f600\n" * (LARGE_BODY_BYTES // 8)
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
OPTIONS = {"stop": ["a"], "logit_bias": {"7": 1.5, "8": 2}, "n": 2, "max_tokens": 3, "seed": 5}
MANY_PROMPTS = ["x" * 300] * 2000
BODIES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"model": "base", "prompt": MANY_PROMPTS} | OPTIONS, ""),
    (COMPLETION, {"model": "poet", "prompt": ["hi", "ho"], "echo": True, "metadata": {"a" * 9: "b"}}, ""),
    (COMPLETION, {"model": "poet", "prompt": [[1, 2], [3]], "request_id": "mine"}, ""),
    (COMPLETION, {"model": "base", "prompt": LONG}, "context_length_exceeded"),
    (COMPLETION, {"model": "base", "prompt": [7] * 290_000}, "context_length_exceeded"),
    (COMPLETION, {"model": "base", "prompt": [[[]]] * 300_000}, "too_many_parts"),
    (COMPLETION, {"model": "nobody", "prompt": LONG}, "model_not_found"),
    (COMPLETION, {"model": LONG, "prompt": "hi"}, "model_not_found"),
    (COMPLETION, {"model": "base", "prompt": "hi", "user": LONG}, "invalid_type"),
    (CHAT, {"model": "poet", "messages": [{"role": "user", "content": "hi"}]} | OPTIONS, ""),
    (CHAT, {"model": "base", "messages": [{"role": "user", "content": LONG}]}, "context_length_exceeded"),
    (CHAT, {"model": "base", "messages": [{"role": "user", "content": "hi"}] * 20_000}, "too_many_parts"),
    ("/tokenize", {"prompt": "x" * 1_000_000}, ""),
    ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, ""),
    ("/tokenize", {"prompt": LONG * 3}, "invalid_value"),
    ("/detokenize", {"tokens": [1] * 250_000}, ""),
    ("/detokenize", {"tokens": [99_999]}, "invalid_value"),
]


def written(body: object) -> bytes:
    """A body's JSON, spaces in front if it would not be large."""
    return json.dumps(body).encode().rjust(LARGE_BODY_BYTES + 1)


def outcome(read: Any, *arguments: Any) -> Any:
    """What reading gives, or the error that a client is told."""
    try:
        return read(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        told = as_api_error(error)
        return told.status, told.body(), told.headers


@pytest.fixture(scope="module")
def client() -> FakeClient:
    return FakeClient(TOKENIZER)


@pytest.fixture(scope="module")
def process(client: FakeClient) -> Iterator[BodyProcess]:
    process = BodyProcess(client)
    yield process
    process.close()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body", "code"), BODIES)
def test_a_body_means_the_same_in_its_own_process(
    client: FakeClient, process: BodyProcess, path: str, body: Any, code: str
) -> None:
    raw = written(body)
    found = outcome(process.read, path, bytearray(raw))
    assert found == outcome(READERS[path], raw, client)
    assert (found[1]["error"]["code"] if isinstance(found, tuple) else "") == code


@pytest.mark.parametrize(
    "raw", [b"[" * 9_000_000, b"{", b'"' + b"\\" * 600_001, b"\xff" * 600_000, b" " * 600_000]
)
def test_what_is_no_json_is_refused_in_the_same_words(
    client: FakeClient, process: BodyProcess, raw: bytes
) -> None:
    for path, reader in READERS.items():
        found = outcome(process.read, path, bytearray(raw))
        assert found == outcome(reader, raw, client)
        assert found[0] == 400


async def test_no_large_body_is_decoded_where_the_event_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = schema.decoded

    def small_only(body: bytes, *arguments: Any) -> Any:
        assert len(body) <= LARGE_BODY_BYTES
        return decoded(body, *arguments)

    monkeypatch.setattr(schema, "decoded", small_only)
    async with session(config=CONFIG) as api:
        for path, body, code in BODIES:
            response = await api.send("POST", path, data=io.BytesIO(written(body)))
            assert response.status == {"": 200, "model_not_found": 404}.get(code, 400), response.body[:200]
            assert not code or response.error["code"] == code
        assert (await api.post("/tokenize", {"prompt": "hi"})).json["count"] == 3


async def test_a_stream_goes_on_from_a_large_body() -> None:
    async with session() as api:
        body = {"model": "base", "prompt": "hi", "stream": True}
        response = await api.send("POST", COMPLETION, data=io.BytesIO(written(body)))
        assert response.body.endswith(b"data: [DONE]\n\n")


async def test_the_body_of_an_administrator_is_never_large() -> None:
    async with session(config=CONFIG) as api:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            response = await api.send("POST", path, data=io.BytesIO(written({"lora_name": "a"})))
            assert (response.status, response.error["code"]) == (413, "body_too_large")
            assert f"over {LARGE_BODY_BYTES} bytes" in response.error["message"]


class Models(FakeClient):
    """Models that do something when they are asked for a name."""

    def __init__(self, act: Any) -> None:
        super().__init__(TOKENIZER)
        self.act = act

    def tokenizer_of(self, model: str) -> Tokenizer:
        return self.act(model)


def chat(model: str) -> bytearray:
    return bytearray(written({"model": model, "messages": [{"role": "user", "content": "hi"}]}))


def test_an_adapter_has_its_own_chat_template_there_too() -> None:
    own = TOKENIZER.of_adapter(Companions(chat_template="own {{ messages[0].content }}"))
    models = Models(lambda model: own if model == "poet" else TOKENIZER)
    process = BodyProcess(models)
    poet, base = (process.read(CHAT, chat(model)) for model in ("poet", "base"))
    process.close()
    assert not isinstance(poet, bytes)
    assert not isinstance(base, bytes)
    assert TOKENIZER.decode(poet.prompts[0]) == "own hi"
    assert TOKENIZER.decode(base.prompts[0]) == "user: hi\nassistant: "


def test_a_model_that_cannot_be_asked_costs_its_own_body_only() -> None:
    def act(model: str) -> Tokenizer:
        if model == "poet":
            raise InvalidAdapter("it is broken")
        return TOKENIZER

    process = BodyProcess(Models(act))
    with pytest.raises(InvalidAdapter, match="it is broken"):
        process.read(CHAT, chat("poet"))
    assert process.read(CHAT, chat("base"))
    process.close()


def test_a_process_that_ends_costs_its_own_body_only() -> None:
    def act(model: str) -> Tokenizer:
        if model == "poet":
            assert process._worker is not None
            os.kill(process._worker._process.pid, signal.SIGKILL)
            process._worker._process.wait()
        return TOKENIZER

    process = BodyProcess(Models(act))
    with pytest.raises(ApiError, match="ended its process") as refusal:
        process.read(CHAT, chat("poet"))
    assert refusal.value.status == 413
    assert process.read(CHAT, chat("base"))
    process.close()
    assert process.read(CHAT, chat("base")), "closing ends what there is, and another body starts another"
    process.close()


def test_a_process_that_says_nothing_is_ended() -> None:
    process = BodyProcess(FakeClient(TOKENIZER), most_s=0.001)
    with pytest.raises(NotInTime, match="not read within"):
        process.read(CHAT, chat("base"))
    assert process._worker is None


def test_a_process_that_ends_with_its_socket_has_not_ended_before() -> None:
    owner = FakeClient(TOKENIZER)
    waits = (
        "import socket, sys; end = socket.socket(fileno=int(sys.argv[1])); end.send(bytes(8)); end.recv(1)"
    )
    worker = WorkerProcess(owner, "wait", ["-c", waits], (), most_s=60)
    assert worker.receive() == b""
    assert worker.end() is None
