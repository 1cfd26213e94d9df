"""Describe the API as an OpenAPI 3.1 document: bodies from the structs that they are decoded by.

It may not know HTTP; a test holds its operations to the routes of the application.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from engine.api import schema
from engine.api.admin.admin_schema import (
    AliasAdapter,
    LimitAdapter,
    PinAdapter,
    RegisterAdapter,
    UnpinAdapter,
)
from engine.api.admin.catalogue_admin import MOST_LISTED
from engine.catalogue.base import AdapterRecord, ClusterRecord
from engine.runner.step_history import StepRecord
from scheduler.request import RANGES

Schema = dict[str, Any]
_REF = "#/components/schemas/"
_EVENTS = "text/event-stream"  # OpenAPI 3.1 has no words for what the events hold
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
BINARY: Schema = {"type": "string", "format": "binary"}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_ANY: Schema = {}
_LOWER = {"max_tokens": 0, "top_k": -1}  # what HTTP takes below SamplingParams' ranges


def object_schema(**properties: Schema) -> Schema:
    """Describe an object that always has these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def array_schema(items: Schema) -> Schema:
    """Describe an array of such items."""
    return {"type": "array", "items": items}


def ref_schema(name: str) -> Schema:
    """Refer to the schema of this name."""
    return {"$ref": _REF + name}


def _response(kind: str, choice: Schema, **more: Schema) -> Schema:
    head = {"id": TEXT, "object": {"const": kind}, "created": NUMBER, "model": TEXT}
    return object_schema(**head, choices=array_schema(choice), usage=ref_schema("Usage"), **more)


def _choice(**more: Schema) -> Schema:
    return object_schema(index=NUMBER, logprobs=_ANY, finish_reason=TEXT, stop_reason=_ANY, **more)


_RESPONSES: Mapping[str, Schema] = {
    "Error": object_schema(error=object_schema(message=TEXT, type=TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT)),
    "Usage": object_schema(
        prompt_tokens=NUMBER,
        completion_tokens=NUMBER,
        total_tokens=NUMBER,
        prompt_tokens_details=object_schema(cached_tokens=NUMBER),
    ),
    "CompletionResponse": _response("text_completion", _choice(text=TEXT)),
    "ChatResponse": _response(
        "chat.completion",
        _choice(message=object_schema(role={"const": "assistant"}, content=TEXT, refusal=_MAYBE_TEXT)),
        prompt_logprobs=_ANY,
    ),
    "Model": object_schema(
        id=TEXT,
        object={"const": "model"},
        created=NUMBER,
        owned_by=TEXT,
        parent=_MAYBE_TEXT,
        max_model_len=NUMBER,
    ),
    "Models": object_schema(object={"const": "list"}, data=array_schema(ref_schema("Model"))),
    "Deleted": object_schema(id=TEXT, object={"const": "model"}, deleted={"const": True}),
    "AdapterDeleted": object_schema(id=TEXT, object={"const": "adapter"}, deleted={"const": True}),
    "Adapters": object_schema(
        object={"const": "list"},
        data=array_schema(ref_schema("Adapter")),
        has_more={"type": "boolean"},
        next=_MAYBE_TEXT,
    ),
    "Steps": object_schema(object={"const": "list"}, data=array_schema(ref_schema("StepRecord"))),
    "Tokens": object_schema(count=NUMBER, max_model_len=NUMBER, tokens=array_schema(NUMBER)),
    "Prompt": object_schema(prompt=TEXT),
    "Health": object_schema(status={"enum": ["ok", "unhealthy"]}),
    "Version": object_schema(version=TEXT),
}


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


ALWAYS = (401, 403, 500, 503)
WITH_BODY = (*ALWAYS, 400, 408, 413)
_CHANGING = (*WITH_BODY, 404)
_ASKING = (*WITH_BODY, 404, 429)

OPERATIONS: Sequence[Operation] = (
    Operation(
        "post", "/v1/completions", "Continue prompts", "CompletionResponse", _ASKING, schema.Completion, True
    ),
    Operation(
        "post", "/v1/chat/completions", "Answer a conversation", "ChatResponse", _ASKING, schema.Chat, True
    ),
    Operation("post", "/tokenize", "Turn text into token ids", "Tokens", (*WITH_BODY, 404), schema.Tokenize),
    Operation(
        "post", "/detokenize", "Turn token ids into text", "Prompt", (*WITH_BODY, 404), schema.Detokenize
    ),
    Operation("get", "/v1/models", "List the base model and its adapters", "Models", ALWAYS),
    Operation("get", "/v1/models/{name}", "Describe one model", "Model", (*ALWAYS, 404)),
    Operation("post", "/v1/load_lora_adapter", "Load an adapter", "Model", WITH_BODY, schema.LoadAdapter),
    Operation(
        "post",
        "/v1/unload_lora_adapter",
        "Forget an adapter",
        "Deleted",
        (*WITH_BODY, 404),
        schema.UnloadAdapter,
    ),
    Operation("get", "/cluster", "Describe the cluster", "Cluster", ALWAYS),
    Operation("get", "/debug/steps", "Describe the last steps", "Steps", (*ALWAYS, 404)),
    Operation(
        "get",
        "/v1/adapters",
        "List the registry of adapters, a page at a time",
        "Adapters",
        (*ALWAYS, 400),
        query={"after": TEXT, "limit": NUMBER | {"minimum": 1, "maximum": MOST_LISTED}},
    ),
    Operation("get", "/v1/adapters/{name}", "Describe one adapter", "Adapter", (*ALWAYS, 404)),
    Operation("post", "/v1/adapters", "Register an adapter", "Adapter", _CHANGING, RegisterAdapter),
    Operation(
        "post", "/v1/adapters/alias", "Give a name another's meaning", "Adapter", _CHANGING, AliasAdapter
    ),
    Operation("post", "/v1/adapters/pin", "Keep copies of an adapter", "Adapter", _CHANGING, PinAdapter),
    Operation("post", "/v1/adapters/unpin", "Undo a pin", "Adapter", _CHANGING, UnpinAdapter),
    Operation(
        "post", "/v1/adapters/limit", "Bound an adapter's requests", "Adapter", _CHANGING, LimitAdapter
    ),
    Operation(
        "put",
        "/v1/adapters/{name}",
        "Send an adapter",
        "PushedAdapter",
        (*_CHANGING, 415),
        form=object_schema(config=BINARY, weights=BINARY),
    ),
    Operation("delete", "/v1/adapters/{name}", "Forget an adapter", "AdapterDeleted", (*ALWAYS, 404)),
    Operation("get", "/", "Show the live page", None, (500, 503), content="text/html"),
    Operation(
        "get", "/page/{file}", "Load a file of the page", None, (404, 500, 503), content="text/javascript"
    ),
    Operation("get", "/page/events", "Stream what changes on the page", None, ALWAYS, content=_EVENTS),
    Operation("get", "/health", "Tell whether the engine runs", "Health", ()),
    Operation("get", "/version", "Tell the version", "Version", ()),
    Operation("get", "/metrics", "Tell metrics in Prometheus' text format", None, ALWAYS),
    Operation("get", "/openapi.json", "Describe the API", "Document", ALWAYS),
)


@dataclass(frozen=True, slots=True)
class Description:
    """What is told of operations that not every server has: they, their responses, and the records in those."""

    operations: tuple[Operation, ...] = ()
    responses: Mapping[str, Schema] = field(default_factory=dict[str, Schema])
    records: tuple[type[msgspec.Struct], ...] = ()


def document(version: str, more: Description = Description()) -> Schema:
    """Make the OpenAPI document of a server of this version that has `more` operations."""
    operations = (*OPERATIONS, *more.operations)
    paths: dict[str, Schema] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loraserve", "version": version},
        "paths": paths,
        "components": {
            "schemas": {
                **_bodies(operations),
                **_records(more.records),
                **_RESPONSES,
                **more.responses,
                "Document": {"type": "object"},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> Schema:
    """Describe one operation."""
    content: Schema = (
        {"application/json": {"schema": ref_schema(operation.response)}} if operation.response else {}
    )
    if operation.streams:
        content[_EVENTS] = {}
    if operation.response is None:
        content[operation.content] = {} if operation.content == _EVENTS else {"schema": TEXT}
    responses: Schema = {"200": {"description": "Done", "content": content}}
    for status in sorted(operation.errors):
        error = {"application/json": {"schema": ref_schema("Error")}}
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    if operation.path == "/health":
        responses["503"] = {"description": "The engine does not run", "content": content}
    described: Schema = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        body = {"application/json": {"schema": ref_schema(operation.body.__name__)}}
        described["requestBody"] = {"required": True, "content": body}
    if operation.form is not None:
        body = {"multipart/form-data": {"schema": operation.form}}
        described["requestBody"] = {"required": True, "content": body}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    told: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in names
    ]
    told += [{"name": name, "in": "query", "schema": each} for name, each in operation.query.items()]
    return described | ({"parameters": told} if told else {})


def _records(more: Sequence[type[msgspec.Struct]]) -> dict[str, Schema]:
    """Describe what administrators are told, and `more`."""
    _, components = msgspec.json.schema_components(
        (AdapterRecord, ClusterRecord, StepRecord, *more), ref_template=_REF + "{name}"
    )
    adapter = components.pop("AdapterRecord")
    adapter["properties"]["object"] = {"const": "adapter"}
    cluster = components.pop("ClusterRecord")
    for each in (adapter, cluster, *components.values()):
        each["required"] = list(each["properties"])
    pushed = {"allOf": [ref_schema("Adapter"), object_schema(digest=TEXT)]}
    return components | {"Adapter": adapter, "Cluster": cluster, "PushedAdapter": pushed}


def _bodies(operations: Sequence[Operation]) -> dict[str, Schema]:
    """Describe what the bodies are decoded by. Fields that are not implemented show what asks for nothing."""
    kinds = [operation.body for operation in operations if operation.body is not None]
    wire = [schema.WIRE.get(kind, kind) for kind in kinds]
    _, components = msgspec.json.schema_components(wire, ref_template=_REF + "{name}")
    for kind in kinds:
        properties: dict[str, Schema] = components[kind.__name__]["properties"]
        for name, values in schema.neutral_of(kind).items():
            properties[name] = {
                "enum": [None, *values],
                "description": "Not implemented: accepted, and ignored",
            }
        for name, low, high in RANGES:
            for option in properties.get(name, {}).get("anyOf", ()):
                if option.get("type") in ("integer", "number"):
                    option |= {"minimum": _LOWER.get(name, low), "maximum": high}
    return components


def software_version() -> str:
    """Return the version that is installed."""
    try:
        return version("loraserve")
    except PackageNotFoundError:
        return "unknown: run from a folder that was never installed"
