"""Fields that ask for nothing are accepted, and those that clients of vLLM and SGLang send are honoured."""

from typing import Any

import pytest

from engine.api.neutral import ADAPTER_NEUTRAL, NEUTRAL
from engine.api.schema import Message
from scheduler.request import SamplingParams
from tests.engine.api.session import HI, TOKENIZER, ApiSession, events, session

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "poet", "prompt": "hi", "max_tokens": 4},
    CHAT: {"model": "poet", "messages": HI, "max_tokens": 4},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}
HONOURED = {  # at one endpoint or the other
    *("echo", "best_of", "top_logprobs", "max_completion_tokens"),
    *("add_special_tokens", "add_generation_prompt", "continue_final_message"),
    *("response_format", "structured_outputs", "cache_salt"),
    *("tools", "tool_choice", "parallel_tool_calls", "priority"),
}


def prompt_of(api: ApiSession) -> str:
    """The prompt that was submitted last, as text."""
    return TOKENIZER.decode(api.engine.submitted[-1][1], skip_special=False)


async def test_fields_that_ask_for_nothing_are_accepted_and_change_nothing() -> None:
    async with session() as api:
        for path, body in BODIES.items():
            for field, values in NEUTRAL.items():
                for value in (None, *values):
                    response = await api.post(path, body | {field: value})
                    assert response.status == 200, (path, field, value, response.body)
        assert {params for _, _, params in api.engine.submitted} == {SamplingParams(max_tokens=4)}


async def test_a_field_that_asks_for_what_there_is_not_is_refused_by_its_name() -> None:
    async with session() as api:
        for path, body in BODIES.items():
            for field in NEUTRAL.keys() - HONOURED:
                for value in ("surprise", 7, {"a": 1}, [1]):
                    error = (await api.post(path, body | {field: value})).error
                    assert (error["param"], error["code"]) == (field, "unsupported_value")
                    assert "leave the field out" in error["message"]
        for field, values in {
            "best_of": (True,),
            "priority": (False,),
            "length_penalty": (True, 1.5),
        }.items():
            for value in values:
                assert (await api.post(CHAT, BODIES[CHAT] | {field: value})).error["param"] == field
        assert api.engine.submitted == []


async def test_nulls_within_an_object_are_as_if_left_out() -> None:
    async with session() as api:
        fields = {
            "response_format": {"type": "text", "json_schema": None},
            "structured_outputs": {"json": None},
        }
        assert (await api.post(CHAT, BODIES[CHAT] | fields)).status == 200


async def test_answers_may_be_sent_back_as_they_came_from_any_server() -> None:
    sent_back = dict.fromkeys(name for name in Message.__struct_fields__ if name not in ("role", "content"))
    for empty in (
        sent_back,
        {"annotations": [], "tool_calls": [], "reasoning": "", "refusal": "", "audio": {}},
    ):
        messages = [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            },
            {"role": "assistant", "content": "b"} | empty,
            {"role": "assistant", "content": None, "id": "msg_1"},
            {"role": "user", "content": "c", "cache_control": {"type": "ephemeral"}},
        ]
        async with session() as api:
            assert (await api.post(CHAT, {"model": "base", "messages": messages})).status == 200
            expected = "user: a\nassistant: b\nassistant: \nuser: c\nassistant: "
            assert prompt_of(api) == expected
            assert (await api.post("/tokenize", {"messages": messages})).json["count"] == len(expected)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tool_calls", [{"id": "1"}], "required"),
        ("tool_call_id", "1", "role tool"),
        ("reasoning_content", "hm", "does not support"),
        ("role", "function", "assistant or tool"),
        ("content", None, "required"),
    ],
)
async def test_what_a_message_asks_for_and_there_is_not_is_refused(
    field: str, value: object, words: str
) -> None:
    async with session() as api:
        message = {"role": "user", "content": "hi"} | {field: value}
        error = (await api.post(CHAT, {"model": "base", "messages": [message]})).error
        assert error["param"].startswith("messages[0]")
        assert field in error["message"]
        assert words in error["message"]


async def test_what_is_said_of_a_value_is_in_the_client_s_words() -> None:
    async with session() as api:
        for extra, words in (
            ({"max_tokens": -5}, "max_tokens: -5 is not accepted"),
            ({"logit_bias": {"a": 1}}, '{"a":1}'),
            ({"logit_bias": {"7": "x"}}, '{"7":"x"}'),
            ({"logit_bias": {"7": 101}}, '{"7":101'),
            ({"logit_bias": {"9" * 5000: 1}}, "logit_bias: {"),
            ({"stop": ["a", ""]}, '["a",""]'),
            ({"logit_bias": {str(token): 1 for token in range(1025)}}, "at most 1024"),
            ({"prompt": ["a"] * 2049}, "at most 2048"),
            ({"prompt": "x" * 511, "max_tokens": None}, "This model's maximum context length is 512 tokens."),
        ):
            message = (await api.post(COMPLETIONS, BODIES[COMPLETIONS] | extra)).error["message"]
            assert words in message
            assert not {"None", "NoneType", "True", "False"} & {
                word.strip("'`,:=") for word in message.split()
            }


async def test_sglang_s_lora_path_may_only_repeat_the_model() -> None:
    async with session() as api:
        for path, body in list(BODIES.items())[:2]:
            for same in (None, "poet", ["poet", None]):
                assert (await api.post(path, body | {"lora_path": same})).status == 200
            for other in ("base", "team/coder", ["poet", "base"]):
                assert (await api.post(path, body | {"lora_path": other})).error["param"] == "lora_path"


async def test_true_asks_completions_for_the_log_probability_of_each_token() -> None:
    async with session() as api:
        for given, top in ((True, 1), (False, None), (0, 0), (3, 3)):
            response = await api.post(COMPLETIONS, BODIES[COMPLETIONS] | {"logprobs": given})
            assert api.engine.submitted[-1][2].logprobs == top
            assert (response.json["choices"][0]["logprobs"] is None) == (top is None)


async def test_every_chunk_tells_the_usage_so_far_if_asked_to() -> None:
    async with session() as api:
        for path, body in list(BODIES.items())[:2]:
            options = {"continuous_usage_stats": True, "include_usage": True}
            *chunks, done = events(
                (await api.post(path, body | {"stream": True, "stream_options": options})).body
            )
            assert done == "[DONE]"
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts)
            assert counts[-1] == 4
            assert (await api.post(path, body | {"stream_options": options})).error[
                "param"
            ] == "stream_options"
            nothing = {"stream_options": {"include_usage": False}}
            assert (await api.post(path, body | nothing)).status == 200


async def test_token_ids_come_with_the_answer_whole_and_streamed() -> None:
    async with session() as api:
        api.engine.says = lambda model, prompt: "é!"
        tokens = [*TOKENIZER.encode("é!<|end|>", add_special=False)]
        for path, body in list(BODIES.items())[:2]:
            asked = body | {"return_token_ids": True, "n": 2}
            whole = (await api.post(path, asked)).json
            chunks = events((await api.post(path, asked | {"stream": True})).body)[:-1]
            prompt = list(api.engine.submitted[-1][1])
            at_top = path == CHAT
            assert (whole if at_top else whole["choices"][0])["prompt_token_ids"] == prompt
            assert (chunks[0] if at_top else chunks[0]["choices"][0])["prompt_token_ids"] == prompt
            for index in range(2):
                assert whole["choices"][index]["token_ids"] == tokens
                parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                assert [token for part in parts for token in part.get("token_ids", [])] == tokens


async def test_tokens_may_be_named_by_their_ids() -> None:
    async with session() as api:
        asked = {"return_tokens_as_token_ids": True, "max_tokens": 1}
        names = [f"token_id:{token}" for token in TOKENIZER.encode("p", add_special=False)]
        text = await api.post(COMPLETIONS, BODIES[COMPLETIONS] | asked | {"logprobs": 0})
        assert text.json["choices"][0]["logprobs"]["tokens"] == names
        chat = await api.post(CHAT, BODIES[CHAT] | asked | {"logprobs": True})
        assert [entry["token"] for entry in chat.json["choices"][0]["logprobs"]["content"]] == names


async def test_what_ended_the_text_is_shown_if_asked_for() -> None:
    async with session() as api:
        for extra, text in (
            ({"stop": ["ard"]}, "poet he"),
            ({"stop": ["ard"], "include_stop_str_in_output": True}, "poet heard"),
            ({"stop": ["<|end|>"], "include_stop_str_in_output": True}, "poet heard hi<|end|>"),
            ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "poet heard hi<|end|>"),
            ({"skip_special_tokens": False}, "poet heard hi"),
        ):
            body = {"model": "poet", "prompt": "hi", "max_tokens": 30} | extra
            assert (await api.post(COMPLETIONS, body)).json["choices"][0]["text"] == text


async def test_what_goes_around_a_prompt_is_the_client_s_choice() -> None:
    messages = [*HI, {"role": "assistant", "content": "well"}]
    async with session() as api:
        for extra, prompt in (
            ({}, "user: hi\nassistant: well\nassistant: "),
            ({"add_generation_prompt": False}, "user: hi\nassistant: well\n"),
            ({"continue_final_message": True}, "user: hi\nassistant: well"),
        ):
            assert (await api.post(CHAT, {"model": "base", "messages": messages} | extra)).status == 200
            assert prompt_of(api) == prompt
            assert (await api.post("/tokenize", {"messages": messages} | extra)).json["count"] == len(prompt)
        both = {"continue_final_message": True, "add_generation_prompt": True}
        error = (await api.post(CHAT, {"model": "base", "messages": messages} | both)).error
        assert error["param"] == "continue_final_message"
        await api.post(COMPLETIONS, BODIES[COMPLETIONS] | {"add_special_tokens": False})
        assert prompt_of(api) == "hi"


async def test_a_response_has_the_id_that_its_client_gave() -> None:
    async with session() as api:
        for path, prefix in ((COMPLETIONS, "cmpl"), (CHAT, "chatcmpl")):
            for _ in range(2):  # names need not be unique
                response = await api.post(path, BODIES[path] | {"request_id": "mine.1"})
                assert response.json["id"] == f"{prefix}-mine.1"
        assert (await api.post(CHAT, BODIES[CHAT] | {"request_id": "a b"})).error["param"] == "request_id"


async def test_fields_of_other_servers_loads_are_read() -> None:
    async with session() as api:
        body = {"lora_name": "new", "lora_path": "nowhere"}
        for field, values in ADAPTER_NEUTRAL.items():
            for value in (None, *values):
                response = await api.post("/v1/load_lora_adapter", body | {field: value})
                assert response.error["param"] == "lora_path"  # which is looked at last
            response = await api.post("/v1/load_lora_adapter", body | {field: "surprise"})
            assert response.error["param"] == field
        unload = {"lora_name": "poet", "lora_int_id": 3}
        assert (await api.post("/v1/unload_lora_adapter", unload)).status == 200
