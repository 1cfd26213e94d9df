"""The page of the HTTP API names every field and every limit as they are."""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from engine.api import schema
from engine.api.neutral import ADAPTER_NEUTRAL, NEUTRAL, SAMPLING_NEUTRAL, TOKENS_NEUTRAL
from engine.api.parsing import MAX_PROMPTS
from engine.rpc.rpc_guard import CODES
from scheduler.request import (
    MAX_BIASES,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
)

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
HONOURED, NOTHING, LIMITS, GRPC = re.split(r"^## .*\n", PAGE, flags=re.MULTILINE)[1:]


def told(section: str) -> dict[str, str]:
    """For each field that a list names, the values before it."""
    items = re.findall(r"^- (.+\n(?:  .+\n)*)", section, re.MULTILINE)
    pairs = [" ".join(item.split()).rsplit(": ", 1) for item in items]
    return {field: values for values, fields in pairs for field in re.findall(r"`(\w+)`", fields)}


def shown(table: Mapping[str, tuple[object, ...]]) -> dict[str, str]:
    """The same of a table of the program."""
    return {
        field: " or ".join(f"`{msgspec.json.encode(value).decode()}`" for value in (None, *values))
        for field, values in table.items()
    }


def test_the_fields_that_ask_for_nothing_are_those_of_the_tables() -> None:
    of_requests, others = NOTHING.split("Around token ids:")
    of_tokens, others = others.split("In `sampling_params`:")
    of_sampling, of_adapters = others.split("When an adapter is loaded:")
    assert told(of_tokens) == shown(TOKENS_NEUTRAL)
    assert told(of_sampling) == shown(SAMPLING_NEUTRAL)
    assert told(of_requests) == shown(NEUTRAL)
    assert told(of_adapters) == shown(ADAPTER_NEUTRAL)


def test_every_field_that_is_honoured_is_named() -> None:
    named = set(re.findall(r"`(\w+)", HONOURED))
    for kind in (
        schema.Completion,
        schema.Chat,
        schema.TokenGenerate,
        schema.TokenSampling,
        schema.LoadAdapter,
    ):
        assert set(kind.__struct_fields__) - named == set()


def test_the_limits_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| .*? \| ([0-9]+) \| 400 \|$", LIMITS, re.MULTILINE)
    limits = (MAX_N, MAX_TOP_LOGPROBS, MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS, MAX_BIASES, MAX_PROMPTS)
    assert [int(row) for row in rows] == list(limits)


def test_the_page_tells_the_grpc_code_of_each_status() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+)", GRPC, flags=re.MULTILINE)
    assert rows == [(str(status), code.name) for status, code in CODES.items()]
