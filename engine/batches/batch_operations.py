"""Describe files and batches for the OpenAPI document."""

from collections.abc import Sequence

from engine.api.openapi.operations import (
    ALWAYS,
    NUMBER,
    TEXT,
    WITH_BODY,
    Description,
    Operation,
    Schema,
    array_schema,
    object_schema,
    ref_schema,
)
from engine.batches.batch_records import BatchObject, FileObject, NewBatch

_FOUND = (*ALWAYS, 404)
_FORM = object_schema(file={"type": "string", "format": "binary"}, purpose={"const": "batch"})
_PAGE: dict[str, Schema] = {"after": TEXT, "limit": NUMBER | {"minimum": 1}}
_ORDER: dict[str, Schema] = {"purpose": TEXT, "order": {"enum": ["asc", "desc"]}}


def _listed(name: str) -> Schema:
    return object_schema(
        object={"const": "list"},
        data=array_schema(ref_schema(name)),
        first_id={"type": ["string", "null"]},
        last_id={"type": ["string", "null"]},
        has_more={"type": "boolean"},
    )


_OPERATIONS: Sequence[Operation] = (
    Operation("post", "/v1/files", "Send a file of requests", "FileObject", (*WITH_BODY, 415), form=_FORM),
    Operation("get", "/v1/files", "List files", "Files", (*ALWAYS, 400), query=_PAGE | _ORDER),
    Operation("get", "/v1/files/{file_id}", "Describe one file", "FileObject", _FOUND),
    Operation("delete", "/v1/files/{file_id}", "Delete a file", "FileDeleted", (*_FOUND, 409)),
    Operation(
        "get",
        "/v1/files/{file_id}/content",
        "Load a file's content",
        None,
        _FOUND,
        content="application/jsonl",
    ),
    Operation("post", "/v1/batches", "Have a file's requests answered", "BatchObject", WITH_BODY, NewBatch),
    Operation("get", "/v1/batches", "List batches", "Batches", (*ALWAYS, 400), query=_PAGE),
    Operation("get", "/v1/batches/{batch_id}", "Describe one batch", "BatchObject", _FOUND),
    Operation(
        "post", "/v1/batches/{batch_id}/cancel", "Answer no more of a batch", "BatchObject", (*_FOUND, 409)
    ),
)

DESCRIPTION = Description(
    tuple(_OPERATIONS),
    {
        "Files": _listed("FileObject"),
        "Batches": _listed("BatchObject"),
        "FileDeleted": object_schema(id=TEXT, object={"const": "file"}, deleted={"const": True}),
    },
    (FileObject, BatchObject),
)
"""What `engine.api.openapi.document` is told of these routes."""
