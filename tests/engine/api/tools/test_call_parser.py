"""Calls of tools are found in whatever pieces an answer comes, and what is no call is text."""

import pytest

from engine.api.tools.call_parser import CallParser, CallPiece, CallSyntax, Piece

Calls = list[tuple[str, str]]
NAMES = ("f", "g")


def read(parser: CallParser, text: str, step: int) -> tuple[str, Calls]:
    """The text and the calls (name, arguments) of an answer that comes `step` characters at a time."""
    pieces: list[Piece] = []
    for place in range(0, len(text), step):
        pieces += parser.push(text[place : place + step])
    pieces += parser.push("", final=True)
    calls: Calls = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            name, arguments = (piece.name, "") if piece.name else calls.pop()
            calls.append((name, arguments + piece.arguments))
            assert piece.index == len(calls) - 1
    return "".join(piece for piece in pieces if isinstance(piece, str)), calls


CASES: list[tuple[CallSyntax, str, str, Calls]] = [
    ("hermes", "plain < text", "plain < text", []),
    ("hermes", 'Hi.\n<tool_call>\n{"name": "f", "arguments": {"a": "}<\\""}}\n</tool_call>\n', "Hi.",
     [("f", '{"a": "}<\\""}')]),
    ("hermes", '<tool_call>{"arguments": {"x": [1]}, "name": "g"}</tool_call><tool_call>{"name":"f","arguments":{}}'
     "</tool_call>", "", [("g", '{"x": [1]}'), ("f", "{}")]),
    ("hermes", 'a <tool_call>{"name": "zz", "arguments": {}}</tool_call> b',
     'a <tool_call>{"name": "zz", "arguments": {}}</tool_call> b', []),
    ("hermes", "a <tool_call>no JSON</tool_call>", "a <tool_call>no JSON</tool_call>", []),
    ("hermes", 'x<tool_call>{"name": "f", "arguments": {"a": 1', "x", [("f", '{"a": 1')]),
    ("hermes", 'x <tool_call>{"name": "f", "argu', 'x <tool_call>{"name": "f", "argu', []),
    ("hermes", "x <tool_", "x <tool_", []),
    ("llama3_json", '{"name": "f", "parameters": {"a": [1, {"b": 2}]}}; {"name": "g", "parameters": {}}', "",
     [("f", '{"a": [1, {"b": 2}]}'), ("g", "{}")]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama3_json", '{"answer": 5}', '{"answer": 5}', []),
    ("llama3_json", ' hello {"name": "f"}', ' hello {"name": "f"}', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "",
     [("f", '{"a": 1}'), ("g", "{}")]),
    ("mistral", 'ok [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{"b": "x"}', "ok",
     [("f", '{"a": 1}'), ("g", '{"b": "x"}')]),
    ("mistral", "[TOOL_CALLS]zz{}", "[TOOL_CALLS]zz{}", []),
    ("list", '[{"name": "f", "parameters": {"a":1}}, {"name": "g", "parameters": {}}]', "",
     [("f", '{"a":1}'), ("g", "{}")]),
    ("list", '[{"name": "f", "para', '[{"name": "f", "para', []),
]  # fmt: skip


@pytest.mark.parametrize("step", [1, 5, 10_000])
@pytest.mark.parametrize(("syntax", "text", "said", "calls"), CASES, ids=lambda value: str(value)[:30])
def test_calls_are_told_apart_from_text(
    syntax: CallSyntax, text: str, said: str, calls: Calls, step: int
) -> None:
    assert read(CallParser(syntax, NAMES), text, step) == (said, calls)


@pytest.mark.parametrize("step", [1, 10_000])
def test_all_that_is_written_for_one_named_tool_are_its_arguments(step: int) -> None:
    assert read(CallParser("named", ["f"]), '{"a": 5} ', step) == ("", [("f", '{"a": 5} ')])


@pytest.mark.parametrize("step", [1, 10_000])
def test_one_call_at_most_is_told_where_one_at_most_may_be_made(step: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert read(CallParser("hermes", NAMES, parallel=False), text, step) == ("", [("f", "{}")])


def test_arguments_come_as_they_are_written() -> None:
    parser = CallParser("hermes", NAMES)
    assert parser.push('<tool_call>{"name": "f", ') == []
    assert parser.push('"arguments": ') == []  # they may be no object yet
    begun, some = parser.push('{"a')
    assert isinstance(begun, CallPiece)
    assert (begun.name, begun.arguments) == ("f", "")
    assert some == CallPiece(0, '{"a')
    assert parser.push('": 1}}') == [CallPiece(0, '": 1}')]


def test_ids_are_told_apart_and_are_such_as_mistrals_template_takes() -> None:
    parser = CallParser("mistral", NAMES)
    found = parser.push("[TOOL_CALLS]f{}[TOOL_CALLS]g{}", final=True)
    ids = [piece.call_id for piece in found if isinstance(piece, CallPiece) and piece.call_id]
    assert len(set(ids)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)
