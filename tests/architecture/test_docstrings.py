"""Docstrings: whatever is public has one, it begins as a sentence, and its sentences are short."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.architecture.source import Function, Source, write

MOST_WORDS = 25
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*(?=[-*] )")
_WORD = re.compile(r"[A-Za-z][\w'’-]*")


def undocumented(sources: Sequence[Source]) -> list[str]:
    """Find modules and public classes, functions and methods without a docstring."""
    found: list[str] = []
    for source in sources:
        if not ast.get_docstring(source.tree):
            found.append(f"{source.path}:1 the module")
        found += [
            f"{source.at(node)} {name}"
            for name, node in _public(source.tree, "")
            if not ast.get_docstring(node)
        ]
    return found


def _public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Find what others may use: no private names, nothing inside private classes or functions."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}{child.name}.")


def lower_case_beginnings(sources: Sequence[Source]) -> list[str]:
    """Find functions whose docstring does not begin with an upper-case word."""
    return [
        f"{source.at(node)} {name}: {text.splitlines()[0]}"
        for source in sources
        for name, node in source.definitions()
        if isinstance(node, Function) and (text := ast.get_docstring(node)) and not text[0].isupper()
    ]


def long_sentences(sources: Sequence[Source]) -> list[str]:
    """Find sentences of docstrings with too many words. A colon or a semicolon ends one, as do lists and code."""
    return [
        f"{where}: {words} words, of {MOST_WORDS} at most: {' '.join(sentence.split())}"
        for source in sources
        for where, text in _docstrings(source)
        for sentence in _SENTENCE_END.split(_prose(text))
        if (words := len(_WORD.findall(sentence))) > MOST_WORDS
    ]


def _docstrings(source: Source) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(source.tree):
        yield f"{source.path}:1 the module", text
    for name, node in source.definitions():
        if text := ast.get_docstring(node):
            yield f"{source.at(node)} {name}", text


def _prose(text: str) -> str:
    """Drop a docstring's indented lines, which are code and formulas, and its examples."""
    return "\n".join("" if line.startswith(("    ", ">>>")) else line for line in text.splitlines())


def test_everything_public_has_a_docstring(library: Sequence[Source]) -> None:
    found = undocumented(library)
    assert not found, "\n".join(found)


def test_docstrings_of_functions_begin_with_an_upper_case_word(library: Sequence[Source]) -> None:
    found = lower_case_beginnings(library)
    assert not found, "\n".join(found)


def test_sentences_of_docstrings_are_short(library: Sequence[Source]) -> None:
    found = long_sentences(library)
    assert not found, "\n".join(found)


def test_what_has_no_docstring_is_found(tmp_path: Path) -> None:
    text = "class C:\n    def method(self): ...\n    @property\n    def value(self): ...\nasync def function(): ...\n"
    assert undocumented(write(tmp_path, {"lora/a.py": text})) == [
        "lora/a.py:1 the module",
        "lora/a.py:1 C",
        "lora/a.py:2 C.method",
        "lora/a.py:4 C.value",
        "lora/a.py:5 function",
    ]


def test_what_is_private_or_inside_a_function_needs_no_docstring(tmp_path: Path) -> None:
    private = "class _C:\n    def method(self): ...\ndef _f(): ...\n"
    function = 'def f():\n    """Do it."""\n    def inner(): ...\n'
    public = 'class C:\n    """A thing."""\n    def __init__(self): ...\n'
    assert undocumented(write(tmp_path, {"lora/a.py": f'"""Why."""\n{private}{function}{public}'})) == []


@pytest.mark.parametrize("text", ["`weights` as bytes.", "loads it.", "2 of them.", "(Load it.)"])
def test_a_beginning_that_is_no_upper_case_word_is_found(tmp_path: Path, text: str) -> None:
    sources = write(
        tmp_path, {"lora/a.py": f'class C:\n    def _f(self):\n        """{text}\n\n        More."""\n'}
    )
    assert lower_case_beginnings(sources) == [f"lora/a.py:2 C._f: {text}"]


def test_classes_and_modules_may_begin_as_they_like(tmp_path: Path) -> None:
    text = '"""`a` is a module."""\nclass C:\n    """`C` is a class."""\n    def f(self):\n        """Do it."""\n'
    assert lower_case_beginnings(write(tmp_path, {"lora/a.py": text})) == []


@pytest.mark.parametrize("count", [MOST_WORDS, MOST_WORDS + 1])
@pytest.mark.parametrize(
    "definition", ["", "class _C:\n    ", "def f():\n    ", "def f():\n    def g():\n        "]
)
def test_a_long_sentence_is_found_wherever_it_is(tmp_path: Path, definition: str, count: int) -> None:
    sentence = "Short one. " + " ".join(["word"] * count) + ". Another."
    sources = write(tmp_path, {"lora/a.py": f'{definition}"""{sentence}"""\n'})
    assert len(long_sentences(sources)) == (count > MOST_WORDS)


@pytest.mark.parametrize(
    "end", [". ", ": ", "; ", "! ", "\n\n", "\n- ", "\n\n    x = code(\n\n", "\n>>> code\n\n"]
)
def test_sentences_end_at_their_marks_and_around_lists_and_code(tmp_path: Path, end: str) -> None:
    half = " ".join(["word"] * (MOST_WORDS - 2))
    sources = write(tmp_path, {"lora/a.py": f'"""{half}{end}{half}."""\n'})
    assert long_sentences(sources) == []


def test_lines_of_one_sentence_are_counted_together(tmp_path: Path) -> None:
    half = " ".join(["word"] * (MOST_WORDS - 2))
    assert len(long_sentences(write(tmp_path, {"lora/a.py": f'"""{half}\n{half}."""\n'}))) == 1
