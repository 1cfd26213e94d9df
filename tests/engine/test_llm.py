"""LLM's conversations, on the embedded model."""

import threading
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.config.peer_config import PeerConfig
from engine.text.template_renderer import InvalidChat
from engine.tokenizer import PromptTooLong
from scheduler.request import InvalidParameter
from tests.engine.demo_llm import ASK, GREEDY, said, user
from transport.base import Address


def test_each_conversation_is_answered_under_its_own_adapter(llm: LLM) -> None:
    results = llm.chat([user("garden")] * 2, GREEDY, adapters=["reverse", None])
    assert [result.outputs[0].text for result in results] == ["nedrag", "garden"]


def test_one_conversation_alone_is_answered_as_a_list_of_one(llm: LLM) -> None:
    several: Any = [{"role": "user", "content": "pear"}, {"role": "assistant", "content": "raep"}, *ASK]
    for alone in (ASK, tuple(ASK), several):
        for adapters in ("reverse", ["reverse"]):
            (result,) = llm.chat(alone, GREEDY, adapters=adapters)
            assert result.prompt_token_ids == llm.chat([alone], GREEDY)[0].prompt_token_ids
    assert said(llm.chat(ASK, [GREEDY], adapters=["reverse"])) == ["nedrag"]
    assert llm.chat([], GREEDY) == []


@pytest.mark.parametrize("conversations", [{"role": "user", "content": "x"}, "garden", None, 5], ids=repr)
def test_what_is_neither_one_conversation_nor_a_list_of_them_is_refused(llm: LLM, conversations: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"^conversations=.*give a list of messages"):
        llm.chat(conversations, GREEDY)


def test_a_message_among_conversations_is_refused_by_its_place(llm: LLM) -> None:
    mixed: Any = [ASK, ASK[0]]
    with pytest.raises(InvalidChat, match=r"conversations\[1\]"):
        llm.chat(mixed, GREEDY)


def test_messages_that_the_template_refuses_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidChat, match="refuses these messages"):
        llm.chat([user("garden"), [5]], GREEDY)  # pyright: ignore[reportArgumentType]
    assert llm.engine.core.num_live_requests == 0


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(llm: LLM) -> None:
    long = "x" * (llm.tokenizer.most_chars(128) + 1)
    for ask in (lambda: llm.generate(["hi", long], GREEDY), lambda: llm.chat([user(long)], GREEDY)):
        with pytest.raises(PromptTooLong, match="maximum context length is 128 tokens"):
            ask()
    assert llm.engine.core.num_live_requests == 0


def test_a_chat_template_of_ones_own_writes_the_prompts() -> None:
    llm = LLM(max_model_len=64, kv_cache_bytes=1 << 20, loras={}, chat_template="{{ messages[0].content }}?")
    (result,) = llm.chat([user("garden")], SamplingParams(max_tokens=1))
    assert result.prompt_token_ids == llm.tokenizer.encode("garden?", add_special=False)
    llm.close()


def test_closing_ends_what_is_shared_with_peers() -> None:
    peers = PeerConfig(listen=Address("127.0.0.1", 0), token="x" * 16, plain=True, path="stream")
    others = set(threading.enumerate())  # of other tests in this process
    llm = LLM(max_model_len=64, kv_cache_bytes=1 << 20, peers=peers)
    own = [thread for thread in threading.enumerate() if thread not in others and thread.name == "peer-loop"]
    assert own
    llm.close()
    assert not any(thread.is_alive() for thread in own)


def test_every_form_of_a_prompt_gives_the_same_answer(llm: LLM) -> None:
    token_ids = llm.tokenizer.encode("garden")
    forms: list[Any] = [
        "garden",
        token_ids,
        list(token_ids),
        {"prompt": "garden"},
        {"prompt_token_ids": token_ids},
        {"prompt": "garden", "prompt_token_ids": token_ids, "multi_modal_data": None},
    ]
    results = llm.generate(forms, GREEDY, adapters="reverse")
    assert {result.prompt_token_ids for result in results} == {token_ids}
    assert len({result.outputs[0].token_ids for result in results}) == 1
    for alone in ("garden", {"prompt": "garden"}):
        assert llm.generate(alone, GREEDY, adapters="reverse")[0].outputs == results[0].outputs


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        None,
        {},
        {"prompt": None},
        {"text": "x"},
        {"prompt": "x", "multi_modal_data": {}},
        [1, 2.5],
        [True],
        [-1],
        [9999],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_before_anything_runs(llm: LLM, prompt: Any) -> None:
    steps = llm.engine.core.steps
    with pytest.raises(InvalidParameter, match=r"^prompt"):
        llm.generate(["garden", prompt], GREEDY)
    assert llm.engine.core.steps == steps
    assert llm.engine.core.num_live_requests == 0


def test_parts_of_a_message_are_text_and_an_unknown_role_is_refused(llm: LLM) -> None:
    parts: list[dict[str, object]] = [{"role": "user", "content": [{"type": "text", "text": "garden"}]}]
    (result,) = llm.chat([parts], GREEDY, adapters="reverse")
    assert result.outputs[0].text == "nedrag"
    for message in (
        {"role": "wizard", "content": "x"},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "user"},
    ):
        with pytest.raises(InvalidChat, match=r"conversations\[1\]"):
            llm.chat([parts, [message]], GREEDY)


def test_a_stop_string_is_one_and_why_an_answer_ended_is_a_text(llm: LLM) -> None:
    params: Any = {"temperature": 0, "stop": "dra"}
    (result,) = llm.chat([user("garden")], SamplingParams(**params), adapters="reverse")
    assert result.outputs[0].text == "ne"
    assert result.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 2.5),
        ("n", True),
        ("seed", "1"),
        ("top_k", 1.0),
        ("temperature", "0"),
        ("stop", [5]),
        ("stop", [""]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", "12"),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5.5: 1.0}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", 5),
        ("logit_bias", [5]),
        ("temperature", None),
        ("temperature", [1]),
        ("temperature", 10**400),
        ("top_p", float("nan")),
        ("n", None),
        ("repetition_penalty", 1e-308),
        ("stop", 5),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
    ],
)
def test_a_parameter_of_another_kind_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match=f"^{field}="):
        SamplingParams(**{field: value})


def test_lists_and_mappings_are_taken_as_parameters() -> None:
    params: Any = {"stop": ["a", "b"], "stop_token_ids": [3], "logit_bias": {5: 1.0, 4: 2}}
    none: Any = {"stop": None, "stop_token_ids": None, "logit_bias": None}
    assert SamplingParams(**none) == SamplingParams()
    assert SamplingParams(**params) == SamplingParams(
        stop=("a", "b"), stop_token_ids=(3,), logit_bias=((4, 2), (5, 1.0))
    )
