"""One table of requests, asked of HTTP, of gRPC whole and in parts, and of `LLM`: the answers are equal."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine import LLM
from tests.engine.rpc.doors import Answer, Case, Doors, Refused, opened

DOORS = ("http", "grpc", "grpc stream", "llm")
DRAWN = {"temperature": 0.8, "seed": 7, "ignore_eos": True, "max_tokens": 12}
REFUSALS = {"http": "400", "grpc": "INVALID_ARGUMENT", "grpc stream": "INVALID_ARGUMENT"}
UNKNOWN = {"http": "404", "grpc": "NOT_FOUND", "grpc stream": "NOT_FOUND"}

ANSWERED = {
    "greedy": Case(),
    "an adapter": Case(adapter="reverse"),
    "token ids": Case(prompt=[40, 41, 42], adapter="upper"),
    "drawn by a seed": Case(params=DRAWN),
    "a negative seed": Case(params=DRAWN | {"seed": -(2**63)}),
    "top_k": Case(params=DRAWN | {"top_k": 3}),
    "top_p": Case(params=DRAWN | {"top_p": 0.7}),
    "min_p": Case(params=DRAWN | {"min_p": 0.1}),
    "presence_penalty": Case(params=DRAWN | {"presence_penalty": 1.5}),
    "frequency_penalty": Case(params=DRAWN | {"frequency_penalty": -1.3}),
    "repetition_penalty": Case(params=DRAWN | {"repetition_penalty": 1.7}),
    "logit_bias": Case(params=DRAWN | {"logit_bias": {45: 5.5, 46: -100}}),
    "three sequences": Case(adapter="rot13", params=DRAWN | {"n": 3}),
    "a length": Case(params={"max_tokens": 3}),
    "a least length": Case(params={"min_tokens": 10, "max_tokens": 12}),
    "a stop string": Case(params={"stop": "rd"}),
    "a stop string that is shown": Case(params={"stop": ["rd", "zz"], "include_stop_str_in_output": True}),
    "a stop token": Case(params=DRAWN | {"stop_token_ids": list(range(40, 60))}),
    "beyond the end": Case(params={"ignore_eos": True, "max_tokens": 30}),
    "special tokens shown": Case(params={"ignore_eos": True, "max_tokens": 30, "skip_special_tokens": False}),
    "log-probabilities": Case(adapter="sort", params=DRAWN | {"logprobs": 2}),
    "those drawn by": Case(params=DRAWN | {"logprobs": 2, "logprobs_mode": "processed_logprobs"}),
    "many of them": Case(params={"logprobs": 20, "n": 2}),
    "the prompt's too": Case(params={"prompt_logprobs": 3, "logprobs": 1}),
}

REFUSED = {
    "temperature": Case(params={"temperature": -1}),
    "top_p": Case(params={"top_p": 2}),
    "min_p": Case(params={"min_p": -0.5}),
    "n": Case(params={"n": 129}),
    "presence_penalty": Case(params={"presence_penalty": 3}),
    "frequency_penalty": Case(params={"frequency_penalty": -3}),
    "repetition_penalty": Case(params={"repetition_penalty": 0.001}),
    "logit_bias": Case(params={"logit_bias": {5: 101}}),
    "logit_bias's token": Case(params={"logit_bias": {100_000: 1}}),
    "stop": Case(params={"stop": [""]}),
    "stops": Case(params={"stop": [str(number) for number in range(17)]}),
    "stop_token_ids": Case(params={"stop_token_ids": [100_000]}),
    "min_tokens": Case(params={"min_tokens": 17, "max_tokens": 16}),
    "max_tokens": Case(params={"max_tokens": 4000}),
    "logprobs": Case(params={"logprobs": 21}),
    "prompt_logprobs": Case(params={"prompt_logprobs": 21}),
    "prompt": Case(prompt=[100_000]),
    "prompt's length": Case(prompt="garden " * 400),
    "prompt's and answer's length": Case(prompt=[40] * 120),
}


@pytest.fixture(scope="module")
def doors(llm: LLM) -> Iterator[Doors]:
    with opened(llm) as found:
        yield found


@pytest.mark.parametrize("name", ANSWERED)
def test_every_door_gives_the_same_answers(doors: Doors, name: str) -> None:
    found = {door: doors.ask(door, ANSWERED[name]) for door in DOORS}
    expected = found["llm"]
    assert not isinstance(expected, Refused), expected
    assert any(answer.token_ids for answer in expected)
    for door, answers in found.items():
        assert not isinstance(answers, Refused), (door, answers)
        assert without_logprobs(answers) == without_logprobs(expected), door
        for answer, like in zip(answers, expected, strict=True):
            assert answer.logprobs == pytest.approx(like.logprobs, rel=1e-5, abs=1e-6), door
            assert answer.prompt_logprobs == pytest.approx(like.prompt_logprobs, rel=1e-5, abs=1e-6), door


@pytest.mark.parametrize("name", REFUSED)
def test_every_door_refuses_with_the_same_remedy(doors: Doors, name: str) -> None:
    by_llm = doors.ask("llm", REFUSED[name])
    assert isinstance(by_llm, Refused), by_llm
    remedy = by_llm.words.rpartition(": ")[2]
    assert len(remedy) > 10
    for door, code in REFUSALS.items():
        found = doors.ask(door, REFUSED[name])
        assert isinstance(found, Refused), (door, found)
        assert (found.code, remedy in found.words) == (code, True), (door, found, remedy)


def test_every_door_refuses_an_adapter_that_is_unknown(doors: Doors) -> None:
    case = Case(adapter="nobody")
    by_llm = doors.ask("llm", case)
    assert isinstance(by_llm, Refused)
    assert by_llm.code == "UnknownAdapter"
    for door, code in UNKNOWN.items():
        found = doors.ask(door, case)
        assert isinstance(found, Refused), (door, found)
        assert (found.code, "nobody" in found.words) == (code, True), (door, found)


def without_logprobs(answers: list[Answer]) -> list[Answer]:
    return [replace(answer, logprobs=(), prompt_logprobs=()) for answer in answers]
