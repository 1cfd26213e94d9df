"""Compile forms into grammars, once for all who ask for the same. Any thread may.

What a stranger's form may cost is bounded by llguidance's limits, and those of a process in which it is tried first.
The first tokens are tried here, so that a form which exceeds the limits is refused before a step meets it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.structured.grammar import Grammar, NoTokenAllowed
from engine.structured.grammar_trial import LIMITS, GrammarTrial
from scheduler.parameter_checks import InvalidParameter
from scheduler.structured_outputs import MAX_STRUCTURE_CHARS, StructuredOutputsParams

if TYPE_CHECKING:  # the library declares it for type checkers alone
    from llguidance._lib import JsonCompileOptions

_MOST_KEPT = 256  # grammars, and as many refusals as there are among them
_MOST_KEPT_CHARS = 16 * MAX_STRUCTURE_CHARS
_TRIED_TOKENS = 8
_MOST_REASON_CHARS = 300
_BLANKS = (
    r"( |\r?\n[ \t]{0,20})?"  # as JSON is written; with any number of them a weak model writes nothing else
)
JSON_WRITING: "JsonCompileOptions" = {"whitespace_pattern": _BLANKS, "lenient": False}


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The bytes of a model's tokens by id; those in `special` stand for no text."""

    token_bytes: Sequence[bytes]
    special: frozenset[int]
    encode: Callable[[str], Sequence[int]]


class GrammarCache:
    """Owner of the compiled forms of one model. Which is thrown away first: what was not asked for the longest."""

    def __init__(
        self,
        read_table: Callable[[], TokenTable],
        most_kept: int = _MOST_KEPT,
        most_kept_chars: int = _MOST_KEPT_CHARS,
    ) -> None:
        """Read the tokens, which takes a while, when the first form is compiled."""
        self._read_table = read_table
        self._most_kept, self._most_kept_chars = most_kept, most_kept_chars
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()
        self._kept_chars = 0
        self._trial = GrammarTrial()
        self._tokenizer: LLTokenizer | None = None
        self._reading = threading.Lock()

    def known(self, asked: StructuredOutputsParams) -> Grammar | None:
        """Return the grammar of a form that has been compiled. Raises the refusal of one that was refused."""
        with self._lock:
            found = self._kept.get(asked)
            if found is not None:
                self._kept.move_to_end(asked)
        return _result(found, asked) if found is not None and found.done() else None

    def compile(self, asked: StructuredOutputsParams) -> Grammar:
        """Return the form's grammar. Raises InvalidParameter for a form that cannot be had."""
        with self._lock:
            found = self._kept.get(asked)
            own = found is None
            if found is None:
                found = self._kept[asked] = Future[Grammar]()
                self._kept_chars += len(asked.source)
                self._make_room()
            self._kept.move_to_end(asked)
        if own:
            try:
                found.set_result(self._compile(asked))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the same form is told
                found.set_exception(error)
                if not isinstance(error, InvalidParameter):
                    self._forget(asked)
        return _result(found, asked)

    def close(self) -> None:
        """End the process in which forms are tried; a form that comes later starts another."""
        self._trial.close()

    def _make_room(self) -> None:
        while len(self._kept) > self._most_kept or self._kept_chars > self._most_kept_chars:
            old, _ = self._kept.popitem(last=False)
            self._kept_chars -= len(old.source)

    def _forget(self, asked: StructuredOutputsParams) -> None:
        with self._lock:
            if self._kept.pop(asked, None) is not None:
                self._kept_chars -= len(asked.source)

    def _compile(self, asked: StructuredOutputsParams) -> Grammar:
        tokenizer = self._read_tokens()
        try:
            written = _written(asked)
        except ValueError as error:
            raise asked.refusal(_remedy(str(error))) from error
        if reason := self._trial.refusal(
            written
        ):  # here a panic of the library has ended a process, not this one
            raise asked.refusal(_remedy(reason))
        matcher = LLMatcher(tokenizer, written, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise asked.refusal(_remedy(matcher.get_error()))
        grammar = Grammar(matcher, tokenizer.vocab_size - 1)
        self._try_tokens(asked, grammar)
        return grammar

    def _try_tokens(self, asked: StructuredOutputsParams, grammar: Grammar) -> None:
        """Draw a few tokens, the lowest each time. Raises InvalidParameter if there is none."""
        end = grammar.vocab_size  # no token of the model: it stands for those of all requests
        matcher, drawn = grammar.begin(frozenset({end})), list[int]()
        try:
            while len(drawn) < _TRIED_TOKENS and end not in drawn:
                matcher.follow(drawn)
                bits = np.unpackbits(matcher.allowed(may_end=False).view(np.uint8), bitorder="little")
                drawn.append(int(bits.argmax()))
        except NoTokenAllowed as error:
            raise asked.refusal(_remedy(str(error) or "no text has this form")) from error

    def _read_tokens(self) -> LLTokenizer:
        with self._reading:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(TokenizerWrapper(_TableTokenizer(self._read_table())))
            return self._tokenizer


class _TableTokenizer:
    """A token table in the shape that llguidance asks for, with an end token of its own as the last."""

    bos_token_id = None

    def __init__(self, table: TokenTable) -> None:
        self.tokens = [*table.token_bytes, b"<end>"]
        self.eos_token_id = len(table.token_bytes)
        self.special_token_ids = [*sorted(table.special), self.eos_token_id]
        self._encode = table.encode

    def __call__(self, text: str) -> list[int]:
        return list(self._encode(text))


def _written(asked: StructuredOutputsParams) -> str:
    """Write the form as llguidance reads it. Raises ValueError for what cannot be written so."""
    match asked.form:
        case "json":
            return LLMatcher.grammar_from_json_schema(asked.source, overrides=JSON_WRITING)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_WRITING)
        case "choice":
            return llguidance.grammar_from("lark", "start: " + " | ".join(map(_quoted, asked.choice or ())))
        case "regex":
            return llguidance.grammar_from("regex", asked.source)
        case _:
            return llguidance.grammar_from("grammar", asked.source)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _remedy(reason: str) -> str:
    told = " ".join(reason.replace("<non-verbose/>", "").partition("<state>")[0].split())[:_MOST_REASON_CHARS]
    return f"it cannot be compiled ({told}): write it otherwise"


def _result(found: "Future[Grammar]", asked: StructuredOutputsParams) -> Grammar:
    """Wait for a grammar. Raises its refusal, in the words of this client."""
    try:
        return found.result()
    except InvalidParameter as error:
        raise asked.refusal(error.remedy) from None
