"""Whatever is sent to a route that reads JSON: an answer or OpenAI's error, never a 5xx, and nothing left running."""

import asyncio
import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.api.openapi.routes import OPERATIONS
from engine.api.schema import neutral_of
from tests.chance import examples
from tests.engine.api.session import HI, ApiSession, Response, events, session

GENERATE: dict[str, Any] = {
    "model": "poet", "max_tokens": 3, "temperature": 0.5, "top_p": 1, "n": 2, "seed": 1, "stop": ["x"],
    "logit_bias": {"7": 1.5}, "stream": True, "stream_options": {"include_usage": True}, "stop_token_ids": [3],
    "prompt_logprobs": 1, "min_tokens": 1, "return_token_ids": True, "logprobs": True,
}  # fmt: skip
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": GENERATE | {"prompt": ["hi", "ho"], "echo": True},
    "/v1/chat/completions": GENERATE | {"messages": HI, "top_logprobs": 2},
    "/inference/v1/generate": {"token_ids": [104, 105], "sampling_params": {"max_tokens": 3}, "stream": True},
    "/tokenize": {"prompt": "hi", "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "nowhere", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "new", "lora_int_id": 1},
    "/v1/adapters": {"name": "new", "source": "nowhere", "replace": True, "copies": 1, "max_requests": 0},
    "/v1/adapters/alias": {"name": "new", "target": "none"},
    "/v1/adapters/pin": {"name": "none", "copies": 2},
    "/v1/adapters/unpin": {"name": "none"},
    "/v1/adapters/hold": {"name": "none", "seconds": 3},
    "/v1/adapters/release": {"name": "none"},
    "/v1/adapters/abort": {"name": "none"},
    "/v1/adapters/limit": {"name": "none", "max_requests": 3},
}
FIELDS = {
    operation.path: sorted({*operation.body.__struct_fields__, *neutral_of(operation.body)})
    for operation in OPERATIONS
    if operation.body is not None
}
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from([2**31, 2**63, -(2**63), 10**30])
) | (
    st.floats() | st.text(max_size=8) | st.sampled_from(["user", "text", "poet", "\ufeff", "\x00", "<|end|>"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoilt(draw: st.DrawFn, path: str) -> bytes:
    """A valid body, with fields that were given other values or taken away, or with bytes that were changed."""
    body = dict(VALID[path])
    for field in draw(st.lists(st.sampled_from(FIELDS[path]), max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            body.pop(field, None)
        else:
            body[field] = draw(JSON)
    raw = bytearray(json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(raw) - 1))
        raw[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
        if not raw:
            break
    return bytes(raw)


def check(response: Response, api: ApiSession) -> None:
    """Hold a response to the form that its status has."""
    assert response.status < 500, response.body
    if response.status >= 400:
        assert response.error["message"]
        assert response.error["type"]
    elif response.headers["Content-Type"].startswith("text/event-stream"):
        assert events(response.body)[-1] == "[DONE]"
    else:
        assert isinstance(response.json, dict)
    assert api.engine.live == {}


async def test_what_is_spoilt_was_valid() -> None:
    assert VALID.keys() == FIELDS.keys()
    async with session() as api:
        for path, body in VALID.items():
            status = (await api.post(path, body)).status
            outside = {"/v1/load_lora_adapter": 403, "/v1/adapters": 403}
            unknown = dict.fromkeys([each for each in VALID if "adapter" in each], 404)
            assert status == (unknown | outside).get(path, 200), path


def test_no_body_is_the_server_s_fault_and_none_leaves_a_stream_behind() -> None:
    @settings(deadline=None, max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def send(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(VALID)))
        raw = data.draw(spoilt(path) | JSON.map(lambda value: json.dumps(value).encode()))
        check(runner.run(api.send("POST", path, data=raw)), api)

    with asyncio.Runner() as runner:
        opened = session()
        api = runner.run(opened.__aenter__())
        try:
            send()
        finally:
            runner.run(opened.__aexit__(None, None, None))


def test_a_stream_that_is_given_up_leaves_nothing_behind() -> None:
    async def visit() -> None:
        async with session() as api:
            api.engine.gate.clear()
            api.engine.gate_after = 2
            body = msgspec.json.encode(VALID["/v1/completions"])
            async with api.http.post("/v1/completions", data=body) as response:
                await response.content.readany()
                assert len(api.engine.live) == 2
            await api.engine.abort_seen.wait()
            while api.engine.live:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(visit(), 30))
