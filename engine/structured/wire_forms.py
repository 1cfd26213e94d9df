"""Declare how a body asks for a form of its text, in OpenAI's words and in vLLM's, and read what is asked."""

from typing import Annotated, Any, Literal

import msgspec

from scheduler.parameter_checks import InvalidParameter
from scheduler.structured_outputs import StructuredOutputsParams

_Label = Annotated[str, msgspec.Meta(max_length=4096)]


class NamedSchema(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A JSON schema as OpenAI's clients send it. It is always kept to, whatever `strict` says."""

    schema: dict[str, Any]
    name: _Label | None = None
    description: _Label | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """OpenAI's field for the form of a text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """vLLM's field for the form of a text, which is one of the first five; the others may hold its defaults."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None


def asked_form(
    openai: ResponseFormat | None, vllm: StructuredOutputs | None
) -> StructuredOutputsParams | None:
    """Return the form that a body asks for, or None. Raises InvalidParameter that names the field."""
    asked = None if openai is None else _openai_form(openai)
    forms = (vllm.json, vllm.regex, vllm.choice, vllm.grammar, vllm.json_object or None) if vllm else ()
    if vllm is None or all(form is None for form in forms):
        return asked
    if asked is not None:
        remedy = "response_format asks for a form too: give one of them"
        raise InvalidParameter("structured_outputs", msgspec.to_builtins(vllm), remedy)
    return StructuredOutputsParams(
        json=vllm.json,
        regex=vllm.regex,
        choice=None if vllm.choice is None else tuple(vllm.choice),
        grammar=vllm.grammar,
        json_object=vllm.json_object,
    )


def _openai_form(wire: ResponseFormat) -> StructuredOutputsParams | None:
    schema = wire.json_schema
    if wire.type == "json_schema":
        if schema is None:
            raise InvalidParameter("response_format.json_schema", None, "type='json_schema' needs it")
        return StructuredOutputsParams(json=schema.schema, given_as="response_format.json_schema.schema")
    if schema is not None:
        remedy = f"it needs type='json_schema', and type is {wire.type!r}: leave one of them out"
        raise InvalidParameter("response_format.json_schema", schema.name, remedy)
    if wire.type == "text":
        return None
    return StructuredOutputsParams(json_object=True, given_as="response_format")
