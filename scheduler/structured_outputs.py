"""StructuredOutputsParams: the form that a request's text must have, as the client wrote it.

What it compiles to is the engine's business: here it is a frozen value that can be compared and sent.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from scheduler.parameter_checks import InvalidParameter

MAX_STRUCTURE_CHARS = 1 << 16
_FORMS = ("json", "regex", "choice", "grammar", "json_object")
_ONE_FORM = f"give one of {', '.join(_FORMS)}"


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of a text: one of the fields is given. vLLM's class has the same name and fields.

    `json` is a JSON schema, as an object or as its text; `regex` matches the whole text; `choice` lists the
    texts to choose from; `grammar` is one in Lark's or GBNF's notation; `json_object` asks for any JSON object.
    `given_as` is what the client called the field, for messages.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    given_as: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) != 1:
            raise InvalidParameter(self.given_as or "structured_outputs", forms, _ONE_FORM)
        if self.json is not None:
            object.__setattr__(self, "json", self._schema_text())
        if self.choice is not None:
            object.__setattr__(self, "choice", self._choices())
        for value in (self.regex, self.grammar):
            if value is not None and (not isinstance(cast(object, value), str) or not value):
                raise self.refusal("give a text that is not empty")
        if self.json_object is not None and cast(object, self.json_object) is not True:
            raise self.refusal("give true, or leave it out")
        if len(self.source) > MAX_STRUCTURE_CHARS:
            remedy = f"it has {len(self.source)} characters: give at most {MAX_STRUCTURE_CHARS}"
            raise self.refusal(remedy)

    @property
    def form(self) -> str:
        """Return which field is given."""
        return next(name for name in _FORMS if getattr(self, name) is not None)

    @property
    def source(self) -> str:
        """Return what is given as one text."""
        if self.choice is not None:
            return json.dumps(self.choice, ensure_ascii=False)
        return str(self.json or self.regex or self.grammar or "")

    def refusal(self, remedy: str) -> InvalidParameter:
        """Make the error that says why the form cannot be had."""
        return InvalidParameter(
            self.given_as or f"structured_outputs.{self.form}", getattr(self, self.form), remedy
        )

    def _schema_text(self) -> str:
        schema: object = self.json
        try:
            if isinstance(schema, str):
                schema = json.loads(schema)
            if isinstance(schema, Mapping):
                return json.dumps(schema, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):
            pass
        raise self.refusal("give a JSON schema that is an object, or the text of one")

    def _choices(self) -> tuple[str, ...]:
        given: object = self.choice
        texts = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(cast(Any, given))
        if not texts or any(not isinstance(text, str) or not text for text in texts):
            raise self.refusal("give a list of texts that are not empty")
        return texts
