"""Describe the API as an OpenAPI 3.1 document: bodies from the structs that they are decoded by.

It may not know HTTP; a test holds its operations to the routes of the application.
"""

from collections.abc import Sequence
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version

import msgspec

from engine.api import schema
from engine.api.openapi.operations import (
    EVENTS,
    NOTHING_MORE,
    REF,
    TEXT,
    Description,
    Operation,
    Schema,
    object_schema,
    ref_schema,
)
from engine.api.openapi.routes import OPERATIONS, RESPONSES
from engine.catalogue.base import AdapterRecord, ClusterRecord
from engine.runner.step_history import StepRecord
from scheduler.request import RANGES

_LOWER = {"max_tokens": 0, "top_k": -1}  # what HTTP takes below SamplingParams' ranges


def document(version: str, more: Description = NOTHING_MORE) -> Schema:
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
                **RESPONSES,
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
        content[EVENTS] = {}
    if operation.response is None:
        content[operation.content] = {} if operation.content == EVENTS else {"schema": TEXT}
    responses: Schema = {"200": {"description": "Done", "content": content}}
    for status in sorted(operation.errors):
        error = {"application/json": {"schema": ref_schema("Error")}}
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    if operation.path == "/health":
        unhealthy = {"application/json": {"schema": ref_schema("Unhealthy")}}
        responses["503"] = {"description": "Requests cannot be served", "content": unhealthy}
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
        (AdapterRecord, ClusterRecord, StepRecord, *more), ref_template=REF + "{name}"
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
    named = [operation.body for operation in operations if operation.body is not None]
    kinds = [*named, *(inner for kind in named for inner in schema.within(kind).values())]
    wire = [schema.WIRE.get(kind, kind) for kind in kinds]
    _, components = msgspec.json.schema_components(wire, ref_template=REF + "{name}")
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
