"""What grammars allow: texts of the form, all the way to their end, whatever the tokenizer and whoever draws."""

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.structured.grammar import Grammar, NoTokenAllowed
from engine.structured.grammar_cache import GrammarCache, TokenTable
from engine.tokenizer import Tokenizer
from scheduler.parameter_checks import InvalidParameter
from scheduler.structured_outputs import MAX_STRUCTURE_CHARS, StructuredOutputsParams
from tests.fakes.tokenizers import byte_tokenizer, merging_tokenizer, sentencepiece_tokenizer

PADDING = 7  # ids that a model has beyond its tokenizer's
SOON_ENDED = 60  # tokens after which a draw takes what ends the text, where it can
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: Tokenizer(byte_tokenizer()),
    "merges": merging_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@cache
def cache_of(kind: str) -> GrammarCache:
    tokenizer = tokenizer_of(kind)
    return GrammarCache(lambda: tokenizer.table(tokenizer.vocab_size + PADDING))


def end_of(kind: str) -> int:
    """An id that stands for no text."""
    return tokenizer_of(kind).vocab_size + PADDING - 1


def bits(words: Any) -> list[int]:
    return cast(list[int], np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def draw(grammar: Grammar, kind: str, seed: int) -> str:
    """Draw tokens at random until one ends the text; every step must leave one to draw."""
    tokenizer, end, rng = tokenizer_of(kind), end_of(kind), random.Random(seed)
    matcher, drawn = grammar.begin({end}), list[int]()
    closing = {tokenizer.encode(char, add_special=False)[0] for char in '"}]'}
    while True:
        matcher.follow(drawn)
        allowed = bits(matcher.allowed(may_end=True))
        assert max(allowed) < tokenizer.vocab_size or max(allowed) == end
        assert not any(tokenizer.is_special(token_id) for token_id in allowed)
        if len(drawn) >= SOON_ENDED:
            allowed = [end] if end in allowed else sorted(closing.intersection(allowed)) or allowed
        token_id = rng.choice(allowed)
        if token_id == end:
            return b"".join(map(tokenizer.token_bytes, drawn)).decode()
        drawn.append(token_id)
        assert len(drawn) < 2000


LEAVES: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -5, "maximum": 1000},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "number", "minimum": 0, "maximum": 9},
    {"type": "string", "maxLength": 6},
    {"type": "string", "pattern": "^[a-f]{2,4}$"},
    {"enum": ["x", 5, None, "ünï", {"a": [1]}]},
    {"const": {"deep": [True, "é"]}},
]


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "long name", 'q"uote'])
    properties = st.dictionaries(names, inner, max_size=3)
    return properties.flatmap(
        lambda known: st.sets(st.sampled_from(sorted(known)) if known else st.nothing()).map(
            lambda needed: {
                "type": "object",
                "properties": known,
                "required": sorted(needed),
                "additionalProperties": False,
            }
        )
    )


def _larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": least + 2},
        inner,
        st.integers(0, 2),
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices})
    return arrays | either | _objects(inner)


SCHEMAS = _objects(st.recursive(st.sampled_from(LEAVES), _larger, max_leaves=5))


@settings(max_examples=40, deadline=None)
@given(schema=SCHEMAS, kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1 << 30))
def test_whatever_is_drawn_validates_and_never_comes_to_a_dead_end(
    schema: dict[str, Any], kind: str, seed: int
) -> None:
    grammar = cache_of(kind).compile(StructuredOutputsParams(json=schema))
    jsonschema.validate(json.loads(draw(grammar, kind, seed)), schema)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        (StructuredOutputsParams(choice=("yes", "no", 'a "b"\n', "🙂")), ("yes", "no", 'a "b"\n', "🙂").count),
        (StructuredOutputsParams(regex="[ab]{2}(-[0-9]){1,3}"), lambda text: 4 <= len(text) <= 8),
        (StructuredOutputsParams(grammar='start: "<" /[a-z]{1,4}/ ">"'), lambda text: text[:: len(text) - 1] == "<>"),
        (StructuredOutputsParams(grammar='root ::= "up" | "down"'), ("up", "down").count),
        (StructuredOutputsParams(json_object=True), lambda text: isinstance(json.loads(text), dict)),
    ],
    ids=["choice", "regex", "lark", "gbnf", "json_object"],
)  # fmt: skip
def test_every_form_is_kept_to(
    kind: str, asked: StructuredOutputsParams, fits: Callable[[str], object]
) -> None:
    grammar = cache_of(kind).compile(asked)
    for seed in range(3):
        assert fits(draw(grammar, kind, seed))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"json": {"$ref": "#"}}, "cannot be compiled"),
        ({"json": {"$ref": "http://example.com/schema"}}, "not present"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: foo"}, "foo"),
        ({"grammar": 'start: "b" ' + "x? " * 20_000 + '\nx: "a"'}, "cannot be compiled"),
        ({"json": {"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(10)]} for i in range(8)]}},
         "too large"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_by_its_field(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidParameter, match=reason) as caught:
        cache_of("bytes").compile(StructuredOutputsParams(**asked))
    assert caught.value.field == f"structured_outputs.{next(iter(asked))}"


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"json": {}, "regex": "a"}, {"json": "no JSON"}, {"json": "[]"}, {"json": 5}, {"regex": ""},
        {"choice": ()}, {"choice": ("a", "")}, {"choice": "ab"}, {"choice": (1,)}, {"grammar": 5},
        {"json_object": 1}, {"regex": "a" * (MAX_STRUCTURE_CHARS + 1)},
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_no_form_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=r"^structured_outputs"):
        StructuredOutputsParams(**asked)


def test_a_form_that_the_models_tokens_cannot_spell_is_refused() -> None:
    table = TokenTable([b"a", b"b"], frozenset(), lambda text: [])
    with pytest.raises(InvalidParameter, match="no token"):
        GrammarCache(lambda: table).compile(StructuredOutputsParams(regex="c"))


def test_an_end_token_is_allowed_only_once_the_text_has_its_form() -> None:
    grammar = cache_of("bytes").compile(StructuredOutputsParams(choice=("ab", "abc")))
    a, b, c = tokenizer_of("bytes").encode("abc", add_special=False)
    end, stop = end_of("bytes"), end_of("bytes") - 1
    matcher = grammar.begin({end, stop})
    assert bits(matcher.allowed(may_end=True)) == [a]
    matcher.follow([a, b])
    assert bits(matcher.allowed(may_end=True)) == sorted([c, stop, end])
    assert bits(matcher.allowed(may_end=False)) == [c]  # below min_tokens
    matcher.follow([a, b, c])
    assert bits(matcher.allowed(may_end=False)) == [stop, end]  # nothing else is left
    matcher.follow([a, b, c, end])
    assert bits(matcher.allowed(may_end=True)) == [stop, end]  # as with ignore_eos
    matcher.follow([a])  # as after a sequence of the same name
    assert bits(matcher.allowed(may_end=True)) == [b]
    with pytest.raises(NoTokenAllowed):
        matcher.follow([a, c])


def test_a_stop_token_that_alone_goes_on_may_be_drawn() -> None:
    grammar = cache_of("bytes").compile(StructuredOutputsParams(regex="ab"))
    (a,) = tokenizer_of("bytes").encode("a", add_special=False)
    assert bits(grammar.begin({a, end_of("bytes")}).allowed(may_end=True)) == [a]


def test_a_form_is_compiled_once_for_all_and_a_refusal_names_each_clients_own_field() -> None:
    forms = GrammarCache(lambda: tokenizer_of("bytes").table(300))
    assert forms.known(StructuredOutputsParams(regex="a+")) is None
    first = forms.compile(StructuredOutputsParams(regex="a+"))
    assert forms.compile(StructuredOutputsParams(regex="a+", given_as="elsewhere")) is first
    assert forms.known(StructuredOutputsParams(regex="a+")) is first
    for given_as in ("one", "two"):
        with pytest.raises(InvalidParameter, match=f"^{given_as}="):
            forms.compile(StructuredOutputsParams(json={"type": "x"}, given_as=given_as))


def test_what_is_kept_is_bounded_by_number_and_by_size() -> None:
    forms = GrammarCache(lambda: tokenizer_of("bytes").table(300), most_kept=4, most_kept_chars=100)
    first = StructuredOutputsParams(regex="a{1,2}")
    forms.compile(first)
    for number in range(4):
        forms.compile(StructuredOutputsParams(choice=(f"v{number}",)))
    assert forms.known(first) is None
    forms.compile(first)
    forms.compile(StructuredOutputsParams(choice=("x" * 92,)))
    assert forms.known(first) is None


def test_a_form_that_is_costly_to_compile_is_refused_and_the_next_one_is_not_held_up() -> None:
    forms = GrammarCache(lambda: tokenizer_of("bytes").table(300))
    with pytest.raises(InvalidParameter, match="more than 2 s of processor time"):
        forms.compile(StructuredOutputsParams(json={"type": "integer", "multipleOf": 999_983}))
    forms.compile(StructuredOutputsParams(regex="a+"))
    forms.close()
    forms.compile(StructuredOutputsParams(regex="b+"))
    forms.close()


def test_a_process_that_cannot_be_started_is_no_fault_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = GrammarCache(lambda: tokenizer_of("bytes").table(300))
    asked = StructuredOutputsParams(regex="a+")
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", "/nowhere/python")
        with pytest.raises(EngineError, match="no process can be started to try a form"):
            forms.compile(asked)
    forms.compile(asked)
    forms.close()
