"""HTTP itself: keys, request ids, routes, clients that leave, and the pages beside generation."""

import asyncio
import io
import threading
from typing import Any

import pytest

from engine.config.http_config import HttpConfig
from engine.metrics.adapter_totals import OTHER
from engine.metrics.telemetry import MOST_ADAPTERS
from tests.engine.api.session import HI, TOKENIZER, session

COMPLETION = {"model": "base", "prompt": "hi"}


async def test_without_the_key_only_health_and_version_are_open() -> None:
    async with session(api_key="sesame") as api:
        right = {"Authorization": "Bearer sesame"}
        for path in ("/health", "/version"):
            assert (await api.send("GET", path)).status == 200
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "sesame"}):
                response = await api.send("GET", path, headers=headers)
                assert (response.status, response.error["code"]) == (401, "invalid_api_key")
                assert "sesame" not in response.error["message"]
        assert (await api.send("GET", "/v1/models", headers=right)).status == 200
        assert (await api.post("/v1/completions", COMPLETION)).status == 401
        assert (await api.openai.completions.create(model="base", prompt="hi")).choices


@pytest.mark.parametrize("given", ["abc", "A-1_b.c:d/e+f=@", "x" * 128])
async def test_a_request_id_comes_back(given: str) -> None:
    async with session() as api:
        for body in (COMPLETION, COMPLETION | {"stream": True}, {}):
            response = await api.post("/v1/completions", body, headers={"X-Request-Id": given})
            assert response.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", "<script>"])
async def test_a_bad_request_id_is_replaced(given: str) -> None:
    async with session() as api:
        headers = {"X-Request-Id": given}
        for response in (
            await api.post("/v1/completions", COMPLETION, headers=headers),
            await api.send("GET", "/health", headers=headers),
        ):
            assert response.status == 200
            assert len(response.headers["X-Request-Id"]) == 32


async def test_every_answer_has_a_request_id_of_its_own() -> None:
    async with session() as api:
        ids = {
            (await api.send("GET", path)).headers["X-Request-Id"]
            for path in ("/health", "/health", "/nowhere")
        }
        assert len(ids) == 3


async def test_one_request_id_may_be_used_by_two_live_requests() -> None:
    async with session() as api:
        api.engine.gate.clear()
        headers = {"X-Request-Id": "same"}
        posts = [
            asyncio.create_task(api.post("/v1/completions", COMPLETION, headers=headers)) for _ in range(2)
        ]
        await api.engine.gate_reached.wait()
        api.engine.gate.set()
        assert [(await post).status for post in posts] == [200, 200]


async def test_wrong_paths_and_methods_have_openai_s_error_body() -> None:
    async with session() as api:
        nowhere = await api.send("GET", "/v1/nowhere")
        assert (nowhere.status, nowhere.error["code"]) == (404, "unknown_url")
        wrong = await api.send("GET", "/v1/completions")
        assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
        assert "POST" in wrong.error["message"]


async def test_a_body_beyond_the_limit_is_413() -> None:
    async with session() as api:
        response = await api.send(
            "POST", "/v1/completions", data=io.BytesIO(b" " * (HttpConfig().max_body_bytes + 1))
        )
        assert response.status == 413
        assert str(HttpConfig().max_body_bytes) in response.error["message"]


async def test_a_large_body_is_read_all_the_same() -> None:
    async with session() as api:
        api.engine.max_model_len = 200_000
        response = await api.post("/v1/completions", COMPLETION | {"prompt": "x" * 100_000, "max_tokens": 1})
        assert response.json["usage"]["prompt_tokens"] == 100_001


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_client_that_leaves_frees_what_it_asked_for(path: str, stream: bool) -> None:
    async with session() as api:
        api.engine.gate.clear()
        api.engine.gate_after = 3
        body = {"model": "base", "stream": stream, "n": 2}
        body |= {"messages": HI} if "chat" in path else {"prompt": ["a", "b"]}
        request = asyncio.create_task(api.post(path, body))
        await api.engine.gate_reached.wait()
        request.cancel()
        await api.engine.abort_seen.wait()
        expected = 1 if "chat" in path else 2
        while len(api.engine.aborted) < expected:
            api.engine.abort_seen.clear()
            await api.engine.abort_seen.wait()
        assert api.engine.live == {}


async def test_models_are_the_base_and_its_adapters() -> None:
    async with session() as api:
        listed = (await api.openai.models.list()).data
        assert [model.id for model in listed] == ["base", "poet", "team/coder"]
        coder = (await api.send("GET", "/v1/models/team/coder")).json
        assert (coder["parent"], coder["root"], coder["object"]) == ("base", "team/coder", "model")
        base = (await api.send("GET", "/v1/models/base")).json
        assert (base["parent"], base["root"], base["max_model_len"]) == (None, "base", 512)
        assert (await api.send("GET", "/v1/models/nope")).error["code"] == "model_not_found"


async def test_tokens_and_back() -> None:
    async with session() as api:
        found = (
            await api.post("/tokenize", {"model": "poet", "prompt": "hé", "return_token_strs": True})
        ).json
        assert found["tokens"] == list(TOKENIZER.encode("hé"))
        assert (found["count"], found["max_model_len"]) == (4, 512)
        assert found["token_strs"] == ["<|begin|>", "h", r"bytes:\xc3", r"bytes:\xa9"]
        bare = (await api.post("/tokenize", {"prompt": "hé", "add_special_tokens": False})).json["tokens"]
        assert bare == found["tokens"][1:]
        assert (await api.post("/detokenize", {"tokens": bare})).json == {"prompt": "hé"}
        chat = (await api.post("/tokenize", {"messages": HI})).json["tokens"]
        assert chat == list(TOKENIZER.encode_chat(HI))


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "model"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
async def test_tokenizing_refuses_like_everything_else(
    path: str, body: dict[str, object], status: int, param: str
) -> None:
    async with session() as api:
        response = await api.post(path, body)
        assert (response.status, response.error["param"]) == (status, param)


async def test_health_follows_the_engine() -> None:
    async with session() as api:
        assert (await api.send("GET", "/health")).json == {"status": "ok"}
        await api.engine.drain(0)
        response = await api.send("GET", "/health")
        assert (response.status, response.json["status"]) == (503, "unhealthy")
        assert "shutting down" in response.json["reason"]


async def test_metrics_are_prometheus_text() -> None:
    async with session() as api:
        api.engine.telemetry.started("poet")
        response = await api.send("GET", "/metrics")
        assert response.headers["Content-Type"].startswith("text/plain")
        assert b'loraserve_requests_started_total{adapter="poet"} 1.0' in response.body
        assert b'loraserve_kv_blocks{state="used"} 1.0' in response.body


async def test_ten_thousand_adapters_are_told_in_few_series_and_not_by_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with session() as api:
        telemetry = api.engine.telemetry
        for number in range(10_000):
            telemetry.started(f"adapter-{number}")
            telemetry.first_token(f"adapter-{number}", 0.1)
            telemetry.finished(f"adapter-{number}", "stop", 2, 1)
        threads = list[str]()
        render = telemetry.render

        def rendered(*arguments: Any) -> bytes:
            threads.append(threading.current_thread().name)
            return render(*arguments)

        monkeypatch.setattr(telemetry, "render", rendered)
        text = (await api.send("GET", "/metrics")).body.decode()
        assert len(threads) == 1
        assert threads[0] != threading.current_thread().name
        most = MOST_ADAPTERS
        started = [line for line in text.splitlines() if "requests_started_total{" in line]
        assert len(started) == most + 1
        assert f'{{adapter="{OTHER}"}} {10_000 - most}.0' in text
