"""Match module paths with the patterns of an adapter's configuration, in a time that no pattern can blow up.

PEFT matches them as regular expressions, whose time may double with every character of a path. A configuration is a
stranger's, so its patterns are compiled to states instead. All states that a path may be in are followed at once
(Thompson, Regular Expression Search Algorithm, 1968). The cost is at most states times characters. What PEFT
writes and people use is understood: names, `.`, classes, groups, `|`, quantifiers, `^`, `$` and `\\b`.
"""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora.format.adapter_files import Flaw, short

MOST_PATTERN_CHARS = 4096
MOST_STATES = 2048
_MOST_DEPTH = 20
_ALPHABET = string.ascii_letters + string.digits + string.punctuation
_LITERAL = re.compile(r"[\w.-]+", re.ASCII)
_CLASS_ITEM = r"(?:\\[dDwWsS.\-]|[\w.])"
_ATOM = re.compile(rf"\\[dDwWsS]|\\[^\w\s]|\[\^?{_CLASS_ITEM}(?:-?{_CLASS_ITEM})*-?\]|[^\\()\[\]{{}}|*+?^$]")
_ASSERTION = re.compile(r"\^|\$|\\[bB]")
_QUANTIFIER = re.compile(r"([*+?]|\{(\d{1,4})(,?)(\d{0,4})\})\??(?![*+?{])")


@dataclass(frozen=True, slots=True)
class _State:
    """Takes one of `chars` and goes on to the next state; or takes nothing, holds where `assertion` does, and goes
    on to each of `targets`, which count from itself."""

    chars: frozenset[str] | None = None
    targets: tuple[int, ...] = (1,)
    assertion: str = ""


_Program = tuple[_State, ...]


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """A pattern that a path may match; make one with `compile_pattern`."""

    program: _Program
    first: frozenset[str]

    def matches(self, path: str) -> bool:
        """Tell whether the whole path matches."""
        return self._matches_from(path, 0)

    def matches_end(self, path: str) -> bool:
        """Tell whether the path matches, or what follows one of its dots."""
        starts = (at for at in range(len(path)) if at == 0 or path[at - 1] == ".")
        return any(path[start] in self.first and self._matches_from(path, start) for start in starts)

    def _matches_from(self, path: str, start: int) -> bool:
        states = self._closure((0,), path, start)
        for at in range(start, len(path)):
            after = [state + 1 for state in states if path[at] in (self._at(state).chars or ())]
            if not after:
                return False
            states = self._closure(after, path, at + 1)
        return len(self.program) in states

    def _at(self, state: int) -> _State:
        return self.program[state] if state < len(self.program) else _State(frozenset())

    def _closure(self, states: Iterable[int], path: str, at: int) -> set[int]:
        """List the states that are reached from `states` without a character."""
        seen, open_states = set[int](), list(states)
        while open_states:
            number = open_states.pop()
            if number in seen:
                continue
            seen.add(number)
            state = self._at(number)
            if state.chars is None and _holds(state.assertion, path, at):
                open_states.extend(number + target for target in state.targets)
        return seen


@dataclass(frozen=True, slots=True)
class LiteralEnd:
    """A name with its dots, each of which stands for any character as in a pattern."""

    text: str
    last: str

    def matches_end(self, path: str) -> bool:
        """Tell whether the path is the name, or ends with a dot and it."""
        start = len(path) - len(self.text)
        if not path.endswith(self.last) or start < 0 or (start > 0 and path[start - 1] != "."):
            return False
        return all(own in (".", other) for own, other in zip(self.text, path[start:], strict=True))


EndPattern = ModulePattern | LiteralEnd


def is_literal(text: str) -> bool:
    """Tell whether a pattern is a name, whose only special characters are dots."""
    return _LITERAL.fullmatch(text) is not None


def compile_end_pattern(field: str, text: str) -> EndPattern:
    """Compile a pattern for paths' ends; names, which are many, cost least. Raises Flaw, which names the field."""
    if len(text) <= MOST_PATTERN_CHARS and is_literal(text):
        return LiteralEnd(text, text.rsplit(".", 1)[-1])
    return compile_pattern(field, text)


def compile_pattern(field: str, text: str) -> ModulePattern:
    """Compile a pattern. Raises Flaw, which names the field."""
    if len(text) > MOST_PATTERN_CHARS:
        raise Flaw(
            f"the pattern {short(text)} in {field} has {len(text)} characters, at most {MOST_PATTERN_CHARS} are"
            " matched: list the modules' names instead"
        )
    try:
        program = _Parser(text).parse()
    except (_Unreadable, re.error) as error:
        raise Flaw(
            f"there is an invalid regex {short(text)} in {field}, or one beyond what is matched here ({error}):"
            " list the modules' names instead"
        ) from error
    return ModulePattern(program, _first_chars(program))


class _Unreadable(ValueError):
    """Why a pattern is not understood."""


class _Parser:
    """Reads one pattern from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> _Program:
        """Compile the whole text. Raises _Unreadable, or re.error for a class that is none."""
        program = self._alternatives()
        if self._at < len(self._text):
            raise _Unreadable(f"unbalanced parenthesis at position {self._at}")
        return program

    def _alternatives(self) -> _Program:
        program = self._sequence()
        branches = [program]
        while self._take("|"):
            branches.append(self._sequence())
        program = branches.pop()
        while branches:
            branch = branches.pop()
            skip = _State(targets=(len(program) + 1,))
            program = (_State(targets=(1, len(branch) + 2)), *branch, skip, *program)
            _check_size(program)
        return program

    def _sequence(self) -> _Program:
        parts: list[_State] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.extend(self._quantified())
            _check_size(parts)
        return tuple(parts)

    def _quantified(self) -> _Program:
        if found := self._find(_ASSERTION):
            return (_State(assertion=found[0]),)
        part = self._group() if self._take("(") else self._atom()
        if found := self._find(_QUANTIFIER):
            return _repeated(part, found)
        return part

    def _group(self) -> _Program:
        if self._take("?") and not self._take(":"):
            raise _Unreadable(f"a flag, a look around or a named group at position {self._at - 1}")
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise _Unreadable(f"groups nested deeper than {_MOST_DEPTH}")
        part = self._alternatives()
        if not self._take(")"):
            raise _Unreadable(f"a group that is not closed at position {self._at}")
        self._depth -= 1
        return part

    def _atom(self) -> _Program:
        found = self._find(_ATOM)
        if found is None:
            raise _Unreadable(f"{self._text[self._at]!r} at position {self._at}")
        one = re.compile(found[0])  # of one character: its time is bounded
        return (_State(frozenset(char for char in _ALPHABET if one.fullmatch(char))),)

    def _take(self, char: str) -> bool:
        taken = self._text.startswith(char, self._at)
        self._at += taken
        return taken

    def _find(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found:
            self._at = found.end()
        return found


def _repeated(part: _Program, quantifier: re.Match[str]) -> _Program:
    if quantifier[1] == "*":
        return _star(part)
    if quantifier[1] == "?":
        return _optional(part)
    if quantifier[1] == "+":
        return (*part, _State(targets=(-len(part), 1)))
    least = int(quantifier[2])
    if not quantifier[3]:
        most = least
    elif quantifier[4]:
        most = int(quantifier[4])
    else:
        most = None
    if most is not None and most < least:
        raise _Unreadable(f"the quantifier {quantifier[1]}")
    if (len(part) + 1) * max(least + 1, most or 0) > MOST_STATES:
        raise _Unreadable(f"more than {MOST_STATES} states")
    rest = _star(part) if most is None else _optional(part) * (most - least)
    return (*(part * least), *rest)


def _star(part: _Program) -> _Program:
    return (_State(targets=(1, len(part) + 2)), *part, _State(targets=(-len(part) - 1,)))


def _optional(part: _Program) -> _Program:
    return (_State(targets=(1, len(part) + 1)), *part)


def _check_size(states: Sequence[_State]) -> None:
    if len(states) > MOST_STATES:
        raise _Unreadable(f"more than {MOST_STATES} states")


def _first_chars(program: _Program) -> frozenset[str]:
    """List the characters that a match may begin with."""
    chars, seen, open_states = set[str](), set[int](), [0]
    while open_states:
        number = open_states.pop()
        if number in seen or number == len(program):
            continue
        seen.add(number)
        state = program[number]
        if state.chars is None:
            open_states.extend(number + target for target in state.targets)
        else:
            chars |= state.chars
    return frozenset(chars)


def _holds(assertion: str, path: str, at: int) -> bool:
    if not assertion:
        return True
    if assertion == "^":
        return at == 0
    if assertion == "$":
        return at == len(path)
    before, after = path[at - 1 : at] if at else "", path[at : at + 1]
    is_border = bool(re.match(r"\w", before)) != bool(re.match(r"\w", after))
    return is_border == (assertion == r"\b")
