"""Say what an operation of the API is, in OpenAPI's words, for whoever describes its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

Schema = dict[str, Any]
REF = "#/components/schemas/"
EVENTS = "text/event-stream"  # OpenAPI 3.1 has no words for what the events hold
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
BINARY: Schema = {"type": "string", "format": "binary"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
ANY: Schema = {}
ALWAYS = (401, 403, 500, 503)
WITH_BODY = (*ALWAYS, 400, 408, 413)


def object_schema(**properties: Schema) -> Schema:
    """Describe an object that always has these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def array_schema(items: Schema) -> Schema:
    """Describe an array of such items."""
    return {"type": "array", "items": items}


def ref_schema(name: str) -> Schema:
    """Refer to the schema of this name."""
    return {"$ref": REF + name}


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a client may ask for. `errors` are the statuses of OpenAI's error object."""

    method: str
    path: str
    summary: str
    response: str | None  # the name of its schema; None for text
    errors: tuple[int, ...]
    body: type[msgspec.Struct] | None = None
    streams: bool = False
    query: Mapping[str, Schema] = field(default_factory=dict[str, Schema])
    content: str = "text/plain"  # where `response` is None
    form: Schema | None = None  # of a multipart body


@dataclass(frozen=True, slots=True)
class Description:
    """What is told of operations that not every server has: they, their responses, and the records in those."""

    operations: tuple[Operation, ...] = ()
    responses: Mapping[str, Schema] = field(default_factory=dict[str, Schema])
    records: tuple[type[msgspec.Struct], ...] = ()


NOTHING_MORE = Description()


def joined(descriptions: Iterable[Description]) -> Description:
    """Return several descriptions as one."""
    found = tuple(descriptions)
    operations = tuple(operation for each in found for operation in each.operations)
    responses = {name: schema for each in found for name, schema in each.responses.items()}
    return Description(operations, responses, tuple(record for each in found for record in each.records))
