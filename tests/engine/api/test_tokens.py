"""POST /inference/v1/generate: token ids in, token ids out, judged by what judges completions."""

from typing import Any

from engine.api.neutral import SAMPLING_NEUTRAL, TOKENS_NEUTRAL
from scheduler.request import SamplingParams
from tests.engine.api.session import TOKENIZER, events, session

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
PROMPT = list(TOKENIZER.encode("hi", add_special=False))


def body(sampling: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A request of four tokens."""
    return {
        "model": "poet",
        "token_ids": PROMPT,
        "sampling_params": {"max_tokens": 4} | (sampling or {}),
    } | fields


async def test_the_answer_is_the_completion_s_in_token_ids() -> None:
    sampling = {
        "n": 2,
        "seed": 3,
        "temperature": 0.5,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "stop_token_ids": [1],
    }
    async with session() as api:
        told = (await api.post(GENERATE, body(sampling, request_id="mine.1"))).json
        same = {"model": "poet", "prompt": PROMPT, "max_tokens": 4, "return_token_ids": True} | sampling
        text = (await api.post(COMPLETIONS, same | {"return_tokens_as_token_ids": True})).json
        assert api.engine.submitted[0] == api.engine.submitted[1]
    assert told.keys() == {
        "request_id", "system_fingerprint", "created", "model", "choices", "usage", "prompt_logprobs",
        "kv_transfer_params",
    }  # fmt: skip
    assert (told["request_id"], told["model"], told["usage"]) == ("mine.1", "poet", text["usage"])
    for one, other in zip(told["choices"], text["choices"], strict=True):
        assert one.keys() == {"index", "logprobs", "finish_reason", "token_ids"}
        assert one["token_ids"] == other["token_ids"]
        assert (one["index"], one["finish_reason"]) == (other["index"], other["finish_reason"])
        entries = one["logprobs"]["content"]
        assert [entry["logprob"] for entry in entries] == other["logprobs"]["token_logprobs"]
        assert [entry["token"] for entry in entries] == [f"token_id:{token}" for token in one["token_ids"]]
        assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
    assert told["prompt_logprobs"] == text["choices"][0]["prompt_logprobs"]
    assert len(told["prompt_logprobs"]) == len(PROMPT)


async def test_a_stream_tells_the_same_and_its_usage() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with session() as api:
        whole = (await api.post(GENERATE, body({"n": 2, "logprobs": 0}))).json
        *chunks, done = events((await api.post(GENERATE, body({"n": 2, "logprobs": 0}, **options))).body)
    assert done == "[DONE]"
    assert all("object" not in chunk and chunk["request_id"] for chunk in chunks)
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [entry for part in parts for entry in part["logprobs"]["content"]] == choice["logprobs"][
            "content"
        ]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


async def test_without_a_model_the_base_answers_and_without_max_tokens_the_context_is_the_bound() -> None:
    async with session() as api:
        told = await api.post(GENERATE, {"token_ids": PROMPT, "sampling_params": {}})
        assert told.json["model"] == "base"
        assert told.json["choices"][0]["logprobs"] is None
        assert told.json["prompt_logprobs"] is None
        assert api.engine.submitted == [("base", tuple(PROMPT), SamplingParams(max_tokens=None))]


async def test_what_asks_for_nothing_is_accepted_and_what_there_is_not_is_refused_by_its_name() -> None:
    tables = ((TOKENS_NEUTRAL, "", body), (SAMPLING_NEUTRAL, "sampling_params.", lambda **more: body(more)))
    async with session() as api:
        for table, place, made in tables:
            for field, values in table.items():
                for value in (None, *values):
                    assert (await api.post(GENERATE, made(**{field: value}))).status == 200, (field, value)
                for value in ("surprise", {"a": 1}, [7]):
                    error = (await api.post(GENERATE, made(**{field: value}))).error
                    assert (error["param"], error["code"]) == (place + field, "unsupported_value")
        assert {params for _, _, params in api.engine.submitted} == {SamplingParams(max_tokens=4)}


async def test_wrong_fields_are_refused_by_their_place() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids[0]"),
        ({"token_ids": [99999]}, "token_ids"),
        ({"token_ids": [1] * 513}, "token_ids"),
        ({"token_ids": "hi"}, "token_ids"),
        ({"sampling_params": None}, "sampling_params"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "hi"}, "prompt"),
        ({"request_id": "a b"}, "request_id"),
        (body({"n": 0}), "sampling_params.n"),
        (body({"top_p": 0}), "sampling_params.top_p"),
        (body({"logprobs": 21}), "sampling_params.logprobs"),
        (body({"logprobs": -1}), "sampling_params.logprobs"),
        (body({"max_tokens": 0}), "sampling_params.max_tokens"),
        (body({"stop_token_ids": [99999]}), "sampling_params.stop_token_ids"),
        (body({"logit_bias": {"a": 1}}), "sampling_params.logit_bias"),
        (body({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "sampling_params.structured_outputs"),
        (body({"response_format": {"type": "text"}}), "sampling_params.response_format"),
        (body({"temperature": "hot"}), "sampling_params.temperature"),
    ]
    async with session() as api:
        for extra, param in wrong:
            response = await api.post(GENERATE, body() | extra)
            assert (response.status, response.error["param"]) == (400, param), response.body
        assert (await api.post(GENERATE, body(model="no-such"))).status == 404
        assert api.engine.submitted == []
        too_long = await api.post(GENERATE, body({"max_tokens": 512}))
        assert (too_long.error["param"], too_long.error["code"]) == ("token_ids", "context_length_exceeded")
