"""POST /v1/completions as OpenAI's own client sees it."""

from typing import Any

import openai
import pytest

from engine.errors import StepFailed
from scheduler.request import SamplingParams
from scheduler.structured_outputs import StructuredOutputsParams
from tests.engine.api.session import TOKENIZER, events, session


async def test_a_prompt_is_continued_under_the_named_adapter() -> None:
    async with session() as api:
        api.engine.cached_tokens = 2
        response = await api.openai.completions.create(model="poet", prompt="hi", max_tokens=50)
        assert response.choices[0].text == "poet heard hi"
        assert response.choices[0].finish_reason == "stop"
        assert (response.model, response.object) == ("poet", "text_completion")
        assert response.id.startswith("cmpl-")
        assert response.usage is not None
        assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 14)
        assert response.usage.total_tokens == 17
        assert response.usage.prompt_tokens_details is not None
        assert response.usage.prompt_tokens_details.cached_tokens == 2


async def test_sixteen_tokens_unless_told_otherwise() -> None:
    async with session() as api:
        response = await api.openai.completions.create(model="base", prompt="a rather long prompt")
        assert response.choices[0].text == "base heard a rat"
        assert response.choices[0].finish_reason == "length"


async def test_every_field_reaches_the_engine() -> None:
    async with session() as api:
        await api.openai.completions.create(
            model="base", prompt="hi", max_tokens=9, temperature=0.5, top_p=0.25, n=2, seed=-7,
            stop=["x", "yy"], presence_penalty=1.5, frequency_penalty=-1.5, logit_bias={"65": 3, "7": -100},
            logprobs=3, user="me",
            extra_body={
                "top_k": 5, "min_p": 0.125, "repetition_penalty": 1.25, "min_tokens": 2, "ignore_eos": True,
                "stop_token_ids": [3, 4], "prompt_logprobs": 1, "best_of": 2, "store": False,
                "service_tier": "auto", "suffix": None,
            },
        )  # fmt: skip
        expected = SamplingParams(
            n=2, max_tokens=9, min_tokens=2, temperature=0.5, top_k=5, top_p=0.25, min_p=0.125,
            repetition_penalty=1.25, presence_penalty=1.5, frequency_penalty=-1.5,
            logit_bias=((7, -100.0), (65, 3.0)), seed=-7, stop=("x", "yy"), stop_token_ids=(3, 4),
            ignore_eos=True, logprobs=3, prompt_logprobs=1,
        )  # fmt: skip
        assert api.engine.submitted == [("base", TOKENIZER.encode("hi"), expected)]


SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            StructuredOutputsParams(json=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputsParams(json=SCHEMA)),
        (
            {"structured_outputs": {"json": '{"type": "null"}'}},
            StructuredOutputsParams(json={"type": "null"}),
        ),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputsParams(json_object=True)),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, StructuredOutputsParams(regex="a+")),
        ({"structured_outputs": {"choice": ["b", "a"]}}, StructuredOutputsParams(choice=("b", "a"))),
        ({"structured_outputs": {"grammar": "start: /a/"}}, StructuredOutputsParams(grammar="start: /a/")),
        ({"structured_outputs": {"json": None}}, None),
    ],
    ids=str,
)
async def test_the_form_of_a_text_reaches_the_engine(fields: dict[str, Any], expected: object) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    }
    async with session() as api:
        for url, body in bodies.items():
            response = await api.http.post(url, json={"model": "base"} | body | fields)
            assert response.status == 200, await response.text()
        assert [params.structured_outputs for _, _, params in api.engine.submitted] == [expected] * 2


async def test_null_means_not_given() -> None:
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "logit_bias",
        "stream",
        "stream_options",
    )
    more = ("top_k", "echo", "logprobs", "best_of", "suffix", "user", "store", "stop_token_ids", "min_tokens")
    async with session() as api:
        body = {"model": "base", "prompt": "hi"} | dict.fromkeys(names + more)
        assert (await api.post("/v1/completions", body)).status == 200
        assert api.engine.submitted[0][2] == SamplingParams()


async def test_prompts_may_be_texts_token_ids_or_lists_of_either() -> None:
    ids = list(TOKENIZER.encode("hi"))
    async with session() as api:
        for prompt, texts in (
            ("hi", ["hi"]), (["hi", "ho"], ["hi", "ho"]), (ids, ["hi"]), ([ids, ids[:2]], ["hi", "h"]),
        ):  # fmt: skip
            response = await api.openai.completions.create(model="base", prompt=prompt, n=2)
            assert [choice.index for choice in response.choices] == list(range(2 * len(texts)))
            assert [choice.text for choice in response.choices[::2]] == [
                f"base heard {text}" for text in texts
            ]
            assert response.usage is not None
            assert response.usage.prompt_tokens == sum(len(text) + 1 for text in texts)


async def test_echo_puts_the_prompt_in_front_and_scores_it_too() -> None:
    async with session() as api:
        response = await api.openai.completions.create(
            model="base", prompt="hé", max_tokens=2, echo=True, logprobs=1
        )
        choice = response.choices[0]
        assert choice.text == "héba"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["<|begin|>", "h", r"bytes:\xc3", r"bytes:\xa9", "b", "a"]
        assert choice.logprobs.text_offset == [0, 0, 1, 2, 2, 3]
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.top_logprobs[1] == {"h": -0.5}


async def test_offsets_count_special_tokens_where_the_prompt_spells_them() -> None:
    async with session() as api:
        response = await api.openai.completions.create(
            model="base", prompt="h<|end|>i", max_tokens=0, echo=True, logprobs=0
        )
        (choice,) = response.choices
        assert choice.text == "h<|end|>i"
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset == [0, 0, 1, 8]


async def test_echo_alone_scores_a_prompt() -> None:
    async with session() as api:
        response = await api.openai.completions.create(
            model="base", prompt="hi", max_tokens=0, echo=True, logprobs=0
        )
        assert (response.choices[0].text, response.choices[0].finish_reason) == ("hi", "length")
        assert response.choices[0].logprobs is not None
        assert response.choices[0].logprobs.tokens == ["<|begin|>", "h", "i"]
        assert response.usage is not None
        assert response.usage.completion_tokens == 0


async def test_prompt_logprobs_come_with_the_choice() -> None:
    async with session() as api:
        body = {"model": "base", "prompt": "hi", "prompt_logprobs": 1}
        choice = (await api.post("/v1/completions", body)).json["choices"][0]
        h = str(TOKENIZER.encode("h")[1])
        assert choice["prompt_logprobs"][0] is None
        assert choice["prompt_logprobs"][1][h] == {"logprob": -0.5, "rank": 1, "decoded_token": "h"}
        assert len(choice["prompt_logprobs"]) == 3
        assert choice["logprobs"] is None


async def test_a_stream_adds_up_to_the_whole_answer() -> None:
    async with session() as api:
        request = {
            "model": "base",
            "prompt": ["ab", "cd"],
            "n": 2,
            "echo": True,
            "logprobs": 2,
            "max_tokens": 30,
        }
        whole = (await api.post("/v1/completions", request)).json
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await api.post("/v1/completions", request | options)
        assert response.headers["Content-Type"] == "text/event-stream"
        *chunks, last, done = events(response.body)
        assert done == "[DONE]"
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert {chunk["id"] for chunk in chunks} == {last["id"]}
        assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
        for expected in whole["choices"]:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
            assert "".join(part["text"] for part in parts) == expected["text"]
            assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
            assert parts[-1]["finish_reason"] == expected["finish_reason"]
            for name, values in expected["logprobs"].items():
                assert [value for part in parts for value in part["logprobs"][name]] == values


async def test_usage_is_not_sent_unless_asked_for() -> None:
    async with session() as api:
        response = await api.post("/v1/completions", {"model": "base", "prompt": "hi", "stream": True})
        *chunks, done = events(response.body)
        assert done == "[DONE]"
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_a_stop_string_ends_the_text_and_is_named() -> None:
    async with session() as api:
        body = {"model": "base", "prompt": "hi", "stop": ["ard", "zzz"]}
        choice = (await api.post("/v1/completions", body)).json["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("base he", "stop", "ard")


async def test_a_failure_before_the_first_chunk_has_a_status_and_one_after_it_is_an_event() -> None:
    async with session() as api:
        api.engine.failure = StepFailed("the step failed")
        api.engine.fails_after = 0
        body = {"model": "base", "prompt": "hi", "stream": True}
        early = await api.post("/v1/completions", body)
        assert (early.status, early.error["code"]) == (500, "engine_error")
        api.engine.fails_after = 3
        late = await api.post("/v1/completions", body)
        *chunks, error = events(late.body)
        assert late.status == 200
        assert len(chunks) == 3
        assert error["error"]["message"] == "the step failed"
        stream = await api.openai.completions.create(model="base", prompt="hi", stream=True)
        with pytest.raises(openai.APIError, match="the step failed"):
            async for _ in stream:
                pass
        assert api.engine.live == {}


async def test_one_refused_prompt_leaves_none_of_the_others_behind() -> None:
    async with session() as api:
        response = await api.post("/v1/completions", {"model": "base", "prompt": ["ok", "x" * 600]})
        assert response.status == 400
        assert api.engine.live == {}
        assert api.engine.submitted == []
