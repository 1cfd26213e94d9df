"""What cannot be honoured is refused: with the right status, OpenAI's error body and the field's name."""

import asyncio
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.api import schema
from engine.api.errors import FORESEEN, as_api_error
from engine.api.generation import ENDPOINTS, Generation
from engine.errors import Draining, Overloaded
from scheduler.request import InvalidParameter
from tests.chance import examples
from tests.engine.api.session import HI, TOKENIZER, session
from tests.fakes.engine_client import FakeClient

COMPLETION: dict[str, Any] = {"model": "base", "prompt": "hi"}
CHAT: dict[str, Any] = {"model": "base", "messages": HI}

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": 1}, "model"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": "1"}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": [1]}, "frequency_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a" * 257]}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"surprise": 1}}, "stream_options.surprise"),
    ({"stream": "yes"}, "stream"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"guided_json": {}}, "guided_json"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"surprise": "x"}}, "structured_outputs.surprise"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, [2]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "x" * 600}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": HI}, "messages"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": "1"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prompt": "hi"}, "prompt"),
]
CASES = [
    *(("/v1/completions", COMPLETION | extra, param) for extra, param in BOTH + COMPLETION_ONLY),
    *(("/v1/chat/completions", CHAT | extra, param) for extra, param in BOTH + CHAT_ONLY),
]


async def test_wrong_fields_are_refused_by_name() -> None:
    async with session() as api:
        for path, body, param in CASES:
            response = await api.post(path, body)
            assert response.status == 400, (path, body, response.body)
            assert response.error["param"] == param, (path, body, response.error)
            assert response.error["type"] == "invalid_request_error"
            too_long = response.error["code"] == "context_length_exceeded"
            assert too_long or response.error["message"].startswith(param)
        assert api.engine.submitted == []


async def test_what_changes_nothing_is_accepted() -> None:
    neutral: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [],
        "response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "default",
        "user": "me", "metadata": {"a": "b"}, "top_k": -1, "stream_options": None, "stop": None,
    }  # fmt: skip
    async with session() as api:
        assert (await api.post("/v1/chat/completions", CHAT | neutral)).status == 200
        missing = {
            name: (await api.post("/v1/completions", {name: "base"})).error["param"] for name in ("model",)
        }
        assert missing == {"model": "prompt"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b"\xff\xfe", b'"text"', b"[1]", b'{"model": NaN}', b"[" * 10**5]
)
async def test_a_body_that_is_no_json_object_is_a_bad_request(body: bytes) -> None:
    async with session() as api:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/load_lora_adapter"):
            response = await api.send("POST", path, data=body)
            assert response.status == 400
            assert response.error["message"]


async def test_more_sequences_than_the_queue_has_places_are_a_bad_request_and_not_too_many_requests() -> None:
    async with session() as api:
        api.engine.max_waiting = 5
        for body, status in (
            ({"prompt": ["a"] * 3, "n": 2}, 400),
            ({"prompt": ["a"] * 5}, 200),
            ({"n": 6}, 400),
        ):
            response = await api.post("/v1/completions", COMPLETION | body)
            assert response.status == status
            assert status == 200 or "at most 5 may wait (--max-waiting)" in response.error["message"]
        assert len(api.engine.submitted) == 5


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base", "prompt": "hi", "\\ud800": 1}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "hi", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "prompt": "hi", "temperature": 1e999}',
        b'{"model": "base", "prompt": "hi", "priority": Infinity}',
        b'{"model": "base", "prompt": "hi", "documents": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        b'{"model": "base", "prompt": "hi"}'.decode().encode("utf-16"),
        b'{"model": "base", "prompt": "\xe9"}',
        b'{"model": "base", "prompt": "hi", "a\\u0000b": 1}',
        b'{"model": "base", "prompt": "hi"} {}',
    ],
)
async def test_what_json_can_be_made_to_hold_is_a_bad_request(body: bytes) -> None:
    async with session() as api:
        for kind in ("application/json", "application/json; charset=utf-16", "text/plain; charset=nonsense"):
            response = await api.send("POST", "/v1/completions", data=body, headers={"Content-Type": kind})
            assert (response.status, response.error["type"]) == (400, "invalid_request_error")


async def test_a_byte_order_mark_is_passed_over_and_of_two_fields_of_one_name_the_last_counts() -> None:
    async with session() as api:
        raw = b'\xef\xbb\xbf{"model": "base", "prompt": "hi", "max_tokens": 9, "max_tokens": 2}'
        assert (await api.send("POST", "/v1/completions", data=raw)).status == 200
        assert api.engine.submitted[0][2].max_tokens == 2


def test_an_error_can_be_written_whatever_it_quotes() -> None:
    msgspec.json.encode(as_api_error(InvalidParameter("\ud800", "\udfff", "give a text\ud800")).body())
    msgspec.json.encode(as_api_error(InvalidParameter("n", 10**400, "give less")).body())


async def test_the_content_type_does_not_matter() -> None:
    async with session() as api:
        body = b'{"model": "base", "prompt": "hi"}'
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"):
            response = await api.send("POST", "/v1/completions", data=body, headers={"Content-Type": kind})
            assert response.status == 200


async def test_an_unknown_model_is_not_found_by_name() -> None:
    async with session() as api:
        with pytest.raises(openai.NotFoundError, match="no-such-model") as refusal:
            await api.openai.completions.create(model="no-such-model", prompt="hi")
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


async def test_too_many_waiting_is_429_with_a_time_to_retry() -> None:
    async with session() as api:
        api.engine.refusal = Overloaded(waiting=9, limit=8, retry_after_s=3)
        response = await api.post("/v1/completions", COMPLETION | {"stream": True})
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        assert "9 requests wait" in response.error["message"]
        with pytest.raises(openai.RateLimitError):
            await api.openai.chat.completions.create(model="base", messages=HI)


async def test_a_node_that_shuts_down_says_503() -> None:
    async with session() as api:
        api.engine.refusal = Draining()
        response = await api.post("/v1/completions", COMPLETION)
        assert (response.status, response.error["type"]) == (503, "server_error")


async def test_what_nobody_foresaw_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with session() as api:
        api.engine.refusal = KeyError("inner detail")
        response = await api.post("/v1/completions", COMPLETION)
        assert response.status == 500
        assert "inner detail" not in response.error["message"]
        assert "inner detail" in caplog.text


FIELDS = sorted({*schema.Completion.__struct_fields__, *schema.Chat.__struct_fields__})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": JSON}), max_size=3
)
BODIES = st.fixed_dictionaries(
    {"model": st.sampled_from(["base", "poet", "nope"])},
    optional={"prompt": st.text(max_size=8) | JSON, "messages": MESSAGES}
    | {name: JSON for name in FIELDS if name not in ("model", "prompt", "messages")},
)
CLIENT = FakeClient(TOKENIZER)


async def status_of(path: str, raw: bytes) -> int:
    """How a body is answered, HTTP left out; what is raised and not foreseen fails the test."""
    try:
        endpoint = ENDPOINTS[path]
        async with Generation(endpoint, CLIENT, endpoint.read(raw, CLIENT)) as generation:
            msgspec.json.encode(await generation.whole())
    except FORESEEN as error:
        return as_api_error(error).status
    return 200


@settings(deadline=None, max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(sorted(ENDPOINTS)), body=BODIES | JSON)
def test_no_body_is_ever_the_server_s_fault(path: str, body: object) -> None:
    assert asyncio.run(status_of(path, msgspec.json.encode(body))) < 500


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_no_bytes_are_ever_the_server_s_fault(raw: bytes) -> None:
    for endpoint in ENDPOINTS.values():
        with pytest.raises(FORESEEN) as refusal:
            endpoint.read(raw, CLIENT)
        assert as_api_error(refusal.value).status == 400


def test_every_refusal_of_a_parameter_says_what_would_be_accepted() -> None:
    shown = as_api_error(InvalidParameter("n", 0, "give a number from 1 to 128"))
    assert (shown.status, shown.param) == (400, "n")
    assert "from 1 to 128" in shown.message
