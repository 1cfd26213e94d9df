"""Draw bodies that ask for much and are sound: every field within its range, so that the engine has to answer."""

import random
from collections.abc import Callable, Mapping
from typing import Any

Draw = Callable[[random.Random], Any]
_MODELS = ("demo", "demo", "reverse", "upper", "rot13", "sort")
_WORDS = ("garden", "a", "é😀", "two words", "x" * 8, " ", "a\nb")  # so that a prompt fits the context
_MOST_ID, _MOST_NEW = 60, 8


def _ids(chance: random.Random) -> list[int]:
    return [chance.randrange(_MOST_ID) for _ in range(chance.randrange(1, 6))]


def _words(chance: random.Random) -> list[str]:
    return [chance.choice(_WORDS) for _ in range(chance.randrange(1, 5))]


def _prompt(chance: random.Random) -> object:
    return chance.choice((chance.choice(_WORDS), _words(chance), _ids(chance), [_ids(chance), _ids(chance)]))


def _one_of(*values: object) -> Draw:
    return lambda chance: chance.choice(values)


_FLAG = _one_of(True, False, None)
_SAMPLING: Mapping[str, Draw] = {
    "n": _one_of(1, 2, 3, 5, 16, 20),
    "temperature": _one_of(0, 1e-6, 0.7, 1, 2, 100),
    "top_p": _one_of(1, 0.9, 1e-9),
    "top_k": _one_of(-1, 0, 1, 5, 2**31),
    "min_p": _one_of(0, 0.5, 1),
    "presence_penalty": lambda chance: chance.uniform(-2, 2),
    "frequency_penalty": lambda chance: chance.uniform(-2, 2),
    "repetition_penalty": _one_of(0.01, 0.5, 1, 2, 100),
    "seed": _one_of(0, 1, -(2**63), 2**63 - 1),
    "stop": _one_of("a", ["e", "den"], "\n", "é", []),
    "stop_token_ids": _ids,
    "logit_bias": lambda chance: {str(token_id): chance.uniform(-100, 100) for token_id in _ids(chance)},
    "ignore_eos": _FLAG,
    "include_stop_str_in_output": _FLAG,
    "skip_special_tokens": _FLAG,
    "prompt_logprobs": _one_of(0, 1, 20),
    "return_token_ids": _FLAG,
    "return_tokens_as_token_ids": _FLAG,
    "request_id": _one_of("mine", "a" * 128),
    "user": _one_of("", "é"),
    "metadata": _one_of({}, {"a": "b"}),
}
_COMPLETION: Mapping[str, Draw] = {
    "echo": _FLAG,
    "logprobs": _one_of(0, 1, 5, 20, True, False),
    "add_special_tokens": _FLAG,
}
_CHAT: Mapping[str, Draw] = {
    "logprobs": _FLAG,
    "max_completion_tokens": _one_of(1, 5),
    "top_logprobs": _one_of(0, 20),
}
_STREAM = _one_of(None, {"include_usage": True}, {"continuous_usage_stats": True, "include_usage": False})


def sound_completion(chance: random.Random, streams: bool = True) -> dict[str, Any]:
    """Draw a body of /v1/completions that is to be answered."""
    body = _generate(chance, _COMPLETION, streams) | {"prompt": _prompt(chance)}
    if body.get("echo") and chance.random() < 0.3:
        body = {**body, "max_tokens": 0, "min_tokens": 0}
    return body | ({"best_of": body.get("n", 1)} if chance.random() < 0.1 else {})


def sound_chat(chance: random.Random, streams: bool = True) -> dict[str, Any]:
    """Draw a body of /v1/chat/completions that is to be answered."""
    body = _generate(chance, _CHAT, streams)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if "max_completion_tokens" in body:
        body = {**body, "max_tokens": None, "min_tokens": 0}
    turns = [{"role": "user", "content": _content(chance)}]
    if chance.random() < 0.2:
        turns += [{"role": "assistant", "content": "garden"}, {"role": "user", "content": "x"}]
    if chance.random() < 0.1:
        turns = [*turns, {"role": "assistant", "content": "gar"}]
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body | {"messages": turns}


SOUND: Mapping[str, Callable[[random.Random, bool], dict[str, Any]]] = {
    "/v1/completions": sound_completion,
    "/v1/chat/completions": sound_chat,
}
"""What draws sound bodies of the routes that generate; False is for those that may not stream."""


def _content(chance: random.Random) -> object:
    texts = [{"type": "text", "text": word} for word in _words(chance)]
    return chance.choice((chance.choice(_WORDS), texts))


def _generate(chance: random.Random, more: Mapping[str, Draw], streams: bool) -> dict[str, Any]:
    """Draw the fields that both routes share, and some of `more`."""
    draws = {**_SAMPLING, **more}
    names = chance.sample(list(draws), chance.randrange(8))
    most = chance.randrange(1, _MOST_NEW + 1)
    body: dict[str, Any] = {"model": chance.choice(_MODELS), "max_tokens": most}
    body |= {name: draws[name](chance) for name in names}
    if chance.random() < 0.2:
        body["min_tokens"] = chance.randrange(most + 1)
    if streams and chance.random() < 0.4:
        body |= {"stream": True, "stream_options": _STREAM(chance)}
    return body
