"""A prompt that cannot fit is refused before it is tokenised, at every door, as one whose tokens are too many."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine.api.bodies.body_readers import MOST_TRANSLATED, detokenized, tokenized
from engine.api.errors import ApiError
from engine.tokenizer import Tokenizer
from tests.engine.api.session import TOKENIZER, session
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

LENGTH = 512  # FakeClient's max_model_len
TOO_LONG = "x" * (TOKENIZER.most_chars(LENGTH) + 1)


class DeafTokenizer(Tokenizer):
    """Fails the test that has it tokenise a text that is long."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer())
        self._backend = Deaf(self._backend)


class Deaf:
    """A backend that must not be given a long text."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        assert all(len(text) < len(TOO_LONG) for text in texts), "a text that cannot fit was tokenised"
        return self._backend.encode_batch_fast(texts, **options)


CHAT = [{"role": "user", "content": TOO_LONG}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": TOO_LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["hi", TOO_LONG]}, "prompt"),
        ("/v1/completions", {"prompt": [1] * (LENGTH + 1)}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [1] * (LENGTH + 1)]}, "prompt"),
        ("/v1/chat/completions", {"messages": CHAT}, "messages"),
    ],
)
async def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(path: str, body: Any, param: str) -> None:
    async with session(FakeClient(DeafTokenizer())) as api:
        response = await api.post(path, {"model": "base"} | body)
        assert response.status == 400
        assert (response.error["param"], response.error["code"]) == (param, "context_length_exceeded")
        assert f"maximum context length is {LENGTH} tokens" in response.error["message"]


async def test_a_prompt_of_as_many_characters_as_can_fit_is_tokenised() -> None:
    (begin,) = TOKENIZER.encode("<|begin|>", add_special=False)
    async with session() as api:
        prompt = "<|begin|>" * (LENGTH - 1)
        response = await api.post("/v1/completions", {"model": "base", "prompt": prompt, "max_tokens": 1})
        assert response.status == 400, "BOS in front makes one token more"
        assert "characters" not in response.error["message"]
        response = await api.post("/tokenize", {"prompt": prompt, "add_special_tokens": False})
        assert response.json["tokens"] == [begin] * (LENGTH - 1)


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (tokenized, {"prompt": "x" * (MOST_TRANSLATED["characters"] + 1)}, "prompt"),
        (
            tokenized,
            {"messages": [{"role": "user", "content": "x" * (MOST_TRANSLATED["characters"] + 1)}]},
            "messages",
        ),
        (detokenized, {"tokens": [1] * (MOST_TRANSLATED["tokens"] + 1)}, "tokens"),
    ],
)
def test_translating_has_a_limit_of_its_own(
    read: Callable[[bytes, FakeClient], bytes], body: Any, param: str
) -> None:
    unit = "tokens" if param == "tokens" else "characters"
    with pytest.raises(ApiError, match=f"at most {MOST_TRANSLATED[unit]}") as refusal:
        read(json.dumps(body).encode(), FakeClient(DeafTokenizer()))
    assert (refusal.value.status, refusal.value.param) == (400, param)


async def test_a_text_longer_than_any_prompt_may_still_be_counted() -> None:
    async with session() as api:
        response = await api.post("/tokenize", {"prompt": TOO_LONG})
        assert response.json["count"] == len(TOO_LONG) + 1
        assert (await api.post("/detokenize", {"tokens": [1] * 2000})).status == 200
