"""JSON of too many parts is refused before it is decoded, and long texts are not."""

import io
import json
from contextlib import suppress

import pytest

from engine.api import schema
from engine.api.errors import ApiError
from engine.api.json_size import check_json_size
from tests.engine.api.session import session


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ([[1]] * 20_000, "lists and objects"),
        ([1] * 600_000, "values"),
        (["a"] * 40_000, "texts"),
        ([{}] * 20_000, "lists and objects"),
    ],
)
def test_too_many_parts_are_refused_with_their_number(prompt: object, parts: str) -> None:
    with pytest.raises(ApiError, match=f"^the request body has [0-9]+ {parts}, of [0-9]+ at most") as refusal:
        schema.decoded(json.dumps({"model": "base", "prompt": prompt}).encode(), schema.Completion)
    assert (refusal.value.status, refusal.value.code) == (400, "too_many_parts")


@pytest.mark.parametrize(
    "prompt",
    [
        "[[{," * 500_000,
        '"[,' * 200_000,
        '\\"' * 200_000,
        "\\" * 400_001,
        [7] * 290_000,
        [[1, 2, 3]] * 10_000,
        ["a, [b]"] * 20_000,
    ],
)
def test_what_stands_in_texts_is_not_counted(prompt: object) -> None:
    body = json.dumps({"model": "base", "prompt": prompt}).encode()
    assert schema.decoded(body, schema.Completion).prompt == prompt


@pytest.mark.parametrize("body", [b'"' * 100_001, b"\\" * 100_000, b"", b"[" * 9, b'\\"' * 50_000])
def test_what_is_no_json_is_nothing_to_stumble_over(body: bytes) -> None:
    with suppress(ApiError):
        check_json_size(body, "it")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "base", "prompt": [[1]] * 20_000}),
        ("/detokenize", {"tokens": [1] * 600_000}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": [{}] * 20_000}),
    ],
)
async def test_a_body_of_too_many_parts_is_a_400(path: str, body: object) -> None:
    async with session() as api:
        response = await api.send("POST", path, data=io.BytesIO(json.dumps(body).encode()))
        assert (response.status, response.error["code"]) == (400, "too_many_parts")
