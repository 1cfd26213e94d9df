"""Find the calls of tools in an answer as it comes, and tell them piece by piece. Knows neither tokens nor JSON bodies.

What is no call of a tool that was offered is text. Arguments are told as they come where the name stands before them,
as models write it; else once the call is complete.
"""

import json
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from engine.text.tool_syntax import HERMES_CLOSE, HERMES_OPEN, LLAMA_TAG, MISTRAL_OPEN, ToolSyntax

CallSyntax = ToolSyntax | Literal["list", "named"]
"""A model's own syntax; or what a form asked for: a list of calls, or the arguments of one."""

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MISTRAL_HEAD = re.compile(r"\s*([A-Za-z0-9_.-]{1,512})\s*(?:\[CALL_ID\]\S*?)?(?:\[ARGS\])?\s*(?=\{)")
_OPENINGS: dict[str, str] = {"hermes": HERMES_OPEN, "mistral": MISTRAL_OPEN}
_MOST_HEAD_CHARS = 1 << 14  # of a call whose name does not come first
_BLANKS = " \t\r\n"
_BETWEEN = _BLANKS + ",;[]"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of the `index`-th call: its `name` and id when it begins, then some of its arguments' text."""

    index: int
    arguments: str
    name: str | None = None
    call_id: str | None = None


Piece = str | CallPiece


class CallParser:
    """Reads one answer. `push` returns what is new; `calls` counts the calls so far."""

    def __init__(self, syntax: CallSyntax, names: Collection[str], parallel: bool = True) -> None:
        """Begin an answer in which only tools of these names are called, one of them at most without `parallel`."""
        self._syntax, self._names, self._parallel = syntax, names, parallel
        self._held: str = ""  # what is not told yet
        self._opening: str = ""  # of the call on its way, to be told as text if it is none
        self._scan, self._scanned = _ObjectScan(), 0
        self.calls = 0
        self._read: Callable[[bool], Sequence[Piece] | None] = self._arguments
        if syntax != "named":
            self._read = self._text if syntax in _OPENINGS else self._start

    def push(self, text: str, final: bool = False) -> list[Piece]:
        """Take more of the answer, its end if `final`; return the pieces that it completes."""
        self._held += text
        found: list[Piece] = []
        if self._syntax == "named" and self.calls == 0 and (self._held or final):
            found.append(self._begin(next(iter(self._names))))
        while (pieces := self._read(final)) is not None:
            found += pieces
        if final and self._held and self._read != self._skip:
            found.append(self._opening + self._held)
            self._held = self._opening = ""
        return [piece for piece in found if piece != ""]

    def _start(self, final: bool) -> Sequence[Piece] | None:
        """Look whether the answer begins as a call, after blanks; else all of it is text."""
        begun = self._held.lstrip()
        tagged = begun.removeprefix(LLAMA_TAG).lstrip() if self._syntax == "llama3_json" else begun
        if not tagged or (LLAMA_TAG.startswith(begun) and self._syntax == "llama3_json" and not final):
            return None
        if tagged[0] == ("[" if self._syntax == "list" else "{"):
            self._opening = self._held[: len(self._held) - len(tagged)]
            self._held, self._read = tagged, self._between
        else:
            self._read = self._text
        return []

    def _text(self, final: bool) -> Sequence[Piece] | None:
        """Tell text up to where calls begin; blanks before those are not told."""
        opening = _OPENINGS.get(self._syntax, "")
        place = self._held.find(opening) if opening else -1
        if place >= 0:
            before = self._held[:place].rstrip()
            self._opening = self._held[len(before) : place + len(opening)]
            self._held = self._held[place + len(opening) :]
            self._read = self._between
            return [before]
        keep = 0 if final else _kept(self._held, opening)
        if keep == len(self._held) or (final and self.calls and not self._held.strip()):
            self._held = self._held if not final else ""
            return None
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [told]

    def _between(self, final: bool) -> Sequence[Piece] | None:
        """Skip what stands between calls; find where one begins, or where they end."""
        begun = self._held.lstrip(_BLANKS)
        if self._syntax == "mistral" and MISTRAL_OPEN.startswith(begun) and not final:
            return None
        rest = begun if begun.startswith(MISTRAL_OPEN) else begun.lstrip(_BETWEEN)
        self._opening += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest or (HERMES_CLOSE.startswith(rest) and not final):
            return None
        if rest.startswith(HERMES_CLOSE) and self._syntax == "hermes":
            self._opening, self._held = "", rest[len(HERMES_CLOSE) :].lstrip()
            self._read = self._text
            return []
        if rest.startswith(MISTRAL_OPEN) and self._syntax == "mistral":
            self._held = rest[len(MISTRAL_OPEN) :]
            return []
        if rest[0] == "{":
            self._scan, self._scanned, self._read = _ObjectScan(), 0, self._head
            return []
        if self._syntax == "mistral" and (head := _MISTRAL_HEAD.match(rest)) and head[1] in self._names:
            self._held = rest[head.end() :]
            return self._open_call(head[1])
        if self._syntax == "mistral" and not final and re.fullmatch(r"[\w.\[\]-]{1,600}\s*", rest):
            return None
        return self._give_up(rest)

    def _head(self, final: bool) -> Sequence[Piece] | None:
        """Wait for a call's name, or for the whole of a call whose name comes later."""
        if head := _HEAD.match(self._held):
            name = _loaded(head[1])
            if name not in self._names:
                return self._give_up(self._held)
            self._held = self._held[head.end() :]
            return self._open_call(cast(str, name))
        found = self._scan.end_of(self._held[self._scanned :])
        if found is None:
            self._scanned = len(self._held)
            return None if len(self._held) <= _MOST_HEAD_CHARS else self._give_up(self._held)
        end = self._scanned + found
        call = _loaded(self._held[:end])
        fields = cast(dict[str, Any], call) if isinstance(call, dict) else {}
        name = fields.get("name")
        arguments = fields.get("arguments", fields.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return self._give_up(self._held)
        self._held, self._opening = self._held[end:], ""
        self._read = self._between if self._parallel else self._skip
        return [self._begin(name, json.dumps(arguments, ensure_ascii=False))]

    def _open_call(self, name: str) -> Sequence[Piece]:
        self._opening, self._scan, self._read = "", _ObjectScan(), self._arguments
        return [self._begin(name)]

    def _arguments(self, final: bool) -> Sequence[Piece] | None:
        """Tell arguments as they come, to their end."""
        if not self._held:
            return None
        end = None if self._syntax == "named" else self._scan.end_of(self._held)
        told = self._held if end is None else self._held[:end]
        self._held = self._held[len(told) :]
        if end is not None:
            self._read = self._tail if self._parallel else self._skip
        return [CallPiece(self.calls - 1, told)] if told else []

    def _tail(self, final: bool) -> Sequence[Piece] | None:
        """Skip the brace that closes a call, if its syntax has one."""
        rest = self._held.lstrip()
        if not rest:
            self._held = "" if final else self._held
            return None
        self._held, self._read = rest.removeprefix("}"), self._between
        return []

    def _skip(self, final: bool) -> Sequence[Piece] | None:
        """Drop what follows the one call that may be made."""
        self._held = ""
        return None

    def _give_up(self, rest: str) -> Sequence[Piece]:
        """Take what began like calls for text, all that follows too unless calls have an opening of their own."""
        told, self._opening, self._held = self._opening + rest[:1], "", rest[1:]
        self._read = self._text
        return [told]

    def _begin(self, name: str, arguments: str = "") -> CallPiece:
        self.calls += 1
        # Mistral's templates take ids of nine letters and digits only.
        call_id = uuid.uuid4().hex[:9] if self._syntax == "mistral" else f"call_{uuid.uuid4().hex[:24]}"
        return CallPiece(self.calls - 1, arguments, name, call_id)


class _ObjectScan:
    """Finds where a JSON object ends, as its text comes."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._escaped = 0, False, False

    def end_of(self, text: str) -> int | None:
        """Return how much of `text`, which goes on from the last, belongs to the object; None if all does so far."""
        for place, char in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_text = False
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def _kept(text: str, opening: str) -> int:
    """Count the characters at the end of `text` that may be blanks before `opening`, or its beginning."""
    if not opening:
        return 0
    for length in range(min(len(text), len(opening) - 1), 0, -1):
        if opening.startswith(text[-length:]):
            text, kept = text[:-length], length
            return kept + len(text) - len(text.rstrip())
    return len(text) - len(text.rstrip())


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
