"""Patterns of module paths match what regular expressions match, and none of them takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lora.format.adapter_files import Flaw
from lora.format.module_patterns import MOST_PATTERN_CHARS, compile_end_pattern, compile_pattern
from tests.chance import examples

PATHS = [
    f"{root}layers.{layer}.{module}"
    for root in ("", "model.")
    for layer in (0, 1, 12)
    for module in ("self_attn.q_proj", "mlp.up_proj")
]
ATOMS = st.sampled_from(
    [
        "q_proj",
        "layers",
        "1",
        "model",
        ".",
        r"\.",
        r"\d",
        r"[0-2]",
        r"[^.]",
        r"\w",
        "(?:mlp|self_attn)",
        "o|p",
    ]
)
QUANTIFIERS = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "{1,2}", "{2}", "{1,}"])


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.builds("({}){}".format, inner, QUANTIFIERS)
    return group | st.builds("{}{}".format, inner, inner) | st.builds("{}|{}".format, inner, inner)


BORDERS = st.sampled_from(["", "", "", "^", ".*", ".*?", r"\b"])
PATTERNS = st.builds(
    "{}{}{}".format, BORDERS, st.recursive(ATOMS, _nested, max_leaves=6), st.sampled_from(["", "", ".*", "$"])
)


@settings(deadline=None, max_examples=examples(80))
@given(PATTERNS, st.sampled_from(PATHS))
def test_a_pattern_matches_what_its_regex_matches(text: str, path: str) -> None:
    assert compile_pattern("f", text).matches(path) == (re.fullmatch(text, path) is not None)
    ours = compile_end_pattern("f", text).matches_end(path)
    assert ours == (get_pattern_key([text], path) is text)


@pytest.mark.parametrize("text", ["q_proj", "layers.1.self.attn.q_proj", "proj", "roj", "1.mlp.up.proj", "."])
def test_a_name_matches_what_its_regex_matches(text: str) -> None:
    for path in PATHS:
        assert compile_end_pattern("f", text).matches_end(path) == (get_pattern_key([text], path) is text)


@pytest.mark.parametrize(
    "text", [r"(.*.*.*)*x", r"(\w+)+\.x", "(a|a|.)*" * 30 + "x", r"((((.*)*)*)*)*x", "(.?){40}" + "z" * 40]
)
def test_a_pattern_that_blows_up_as_a_regex_is_only_slow_to_write(text: str) -> None:
    assert not compile_pattern("f", text).matches("model.layers.1.self_attn.q_proj" * 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(?i)q_proj", "a flag, a look around or a named group"),
        ("(?=q)q_proj", "a flag, a look around or a named group"),
        (r"(q)_\1", "beyond what is matched here"),
        ("q++", "beyond what is matched here"),
        ("[z-a]", "bad character range"),
        ("(" * 30 + "q" + ")" * 30, "nested deeper"),
        ("((q{999}){999}){999}", "more than 2048 states"),
        ("q{3,2}", "quantifier"),
        ("q)", "unbalanced"),
        ("(q", "not closed"),
        ("q" * (MOST_PATTERN_CHARS + 1), "4097 characters"),
    ],
)
def test_a_pattern_beyond_the_accepted_forms_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(Flaw, match=rf"(?s)in target_modules.*{reason}.*list the modules' names"):
        compile_pattern("target_modules", text)
