"""List what every server answers, and the forms of its responses."""

from collections.abc import Mapping, Sequence

from engine.api import schema
from engine.api.admin.admin_schema import (
    AbortAdapter,
    AliasAdapter,
    HoldAdapter,
    LimitAdapter,
    PinAdapter,
    RegisterAdapter,
    ReleaseAdapter,
    UnpinAdapter,
)
from engine.api.admin.catalogue_admin import MOST_LISTED
from engine.api.openapi.operations import (
    ALWAYS,
    ANY,
    BINARY,
    EVENTS,
    MAYBE_TEXT,
    NUMBER,
    TEXT,
    WITH_BODY,
    Operation,
    Schema,
    array_schema,
    object_schema,
    ref_schema,
)

_CHANGING = (*WITH_BODY, 404)
_ASKING = (*WITH_BODY, 404, 429)


def _response(kind: str, choice: Schema, **more: Schema) -> Schema:
    head = {"id": TEXT, "object": {"const": kind}, "created": NUMBER, "model": TEXT}
    head["system_fingerprint"] = MAYBE_TEXT
    return object_schema(**head, choices=array_schema(choice), usage=ref_schema("Usage"), **more)


def _choice(**more: Schema) -> Schema:
    return object_schema(index=NUMBER, logprobs=ANY, finish_reason=TEXT, stop_reason=ANY, **more)


RESPONSES: Mapping[str, Schema] = {
    "Error": object_schema(error=object_schema(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT)),
    "Usage": object_schema(
        prompt_tokens=NUMBER,
        completion_tokens=NUMBER,
        total_tokens=NUMBER,
        prompt_tokens_details=object_schema(cached_tokens=NUMBER),
    ),
    "CompletionResponse": _response("text_completion", _choice(text=TEXT)),
    "ChatResponse": _response(
        "chat.completion",
        _choice(message=object_schema(role={"const": "assistant"}, content=TEXT, refusal=MAYBE_TEXT)),
        prompt_logprobs=ANY,
    ),
    "TokenResponse": object_schema(
        request_id=TEXT,
        system_fingerprint=MAYBE_TEXT,
        created=NUMBER,
        model=TEXT,
        choices=array_schema(
            object_schema(index=NUMBER, logprobs=ANY, finish_reason=TEXT, token_ids=array_schema(NUMBER))
        ),
        usage=ref_schema("Usage"),
        prompt_logprobs=ANY,
        kv_transfer_params={"type": "null"},
    ),
    "Model": object_schema(
        id=TEXT,
        object={"const": "model"},
        created=NUMBER,
        owned_by=TEXT,
        parent=MAYBE_TEXT,
        max_model_len=NUMBER,
    ),
    "Models": object_schema(object={"const": "list"}, data=array_schema(ref_schema("Model"))),
    "Deleted": object_schema(id=TEXT, object={"const": "model"}, deleted={"const": True}),
    "AdapterDeleted": object_schema(id=TEXT, object={"const": "adapter"}, deleted={"const": True}),
    "AdapterAborted": object_schema(id=TEXT, object={"const": "adapter"}, aborted=NUMBER),
    "Adapters": object_schema(
        object={"const": "list"},
        data=array_schema(ref_schema("Adapter")),
        has_more={"type": "boolean"},
        next=MAYBE_TEXT,
    ),
    "Steps": object_schema(object={"const": "list"}, data=array_schema(ref_schema("StepRecord"))),
    "Tokens": object_schema(count=NUMBER, max_model_len=NUMBER, tokens=array_schema(NUMBER)),
    "Prompt": object_schema(prompt=TEXT),
    "Health": object_schema(status={"const": "ok"}),
    "Unhealthy": object_schema(status={"const": "unhealthy"}, reason=TEXT),
    "Version": object_schema(version=TEXT),
}
"""The forms of responses, by name."""

OPERATIONS: Sequence[Operation] = (
    Operation(
        "post", "/v1/completions", "Continue prompts", "CompletionResponse", _ASKING, schema.Completion, True
    ),
    Operation(
        "post", "/v1/chat/completions", "Answer a conversation", "ChatResponse", _ASKING, schema.Chat, True
    ),
    Operation(
        "post",
        "/inference/v1/generate",
        "Continue token ids by token ids",
        "TokenResponse",
        _ASKING,
        schema.TokenGenerate,
        True,
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
    Operation("post", "/v1/adapters/hold", "Hold an adapter", "Adapter", _CHANGING, HoldAdapter),
    Operation("post", "/v1/adapters/release", "Undo a hold", "Adapter", _CHANGING, ReleaseAdapter),
    Operation(
        "post", "/v1/adapters/abort", "End an adapter's requests", "AdapterAborted", _CHANGING, AbortAdapter
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
    Operation("get", "/page/events", "Stream what changes on the page", None, ALWAYS, content=EVENTS),
    Operation("get", "/health", "Tell whether requests can be served", "Health", ()),
    Operation("get", "/version", "Tell the version", "Version", ()),
    Operation("get", "/metrics", "Tell metrics in Prometheus' text format", None, ALWAYS),
    Operation("get", "/openapi.json", "Describe the API", "Document", ALWAYS),
)
"""Every operation that each server has."""
