"""The description of the API names what there is: every route, every field, and only what is so."""

from typing import Any

from engine.api.adapters import AdapterAdmin
from engine.api.guard import RequestGuard
from engine.api.http import http_app
from engine.api.keys import AccessRules
from engine.api.openapi.document import document
from engine.api.schema import Chat, Completion, TokenGenerate, TokenSampling, neutral_of
from engine.metrics.request_log import RequestLog
from scheduler.request import MAX_N
from tests.engine.api.session import HI, TOKENIZER, session
from tests.fakes.engine_client import FakeClient

DOCUMENT = document("1.2.3")
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def references(value: object) -> set[str]:
    """All that a part of the document refers to."""
    if isinstance(value, dict):
        inner = set().union(*map(references, value.values()))
        return inner | ({value["$ref"]} if isinstance(value.get("$ref"), str) else set())
    return set().union(*map(references, value)) if isinstance(value, list) else set()


async def test_every_route_is_described_and_nothing_else() -> None:
    engine = FakeClient(TOKENIZER)
    app = http_app(engine, AdapterAdmin(engine, ()), RequestGuard(AccessRules([]), RequestLog()))
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    async with session() as api:
        told = (await api.send("GET", "/openapi.json")).json
    described = {(method, path) for path, item in told["paths"].items() for method in item}
    assert described == served


def test_the_document_is_complete_in_itself() -> None:
    assert references(DOCUMENT) == {f"#/components/schemas/{name}" for name in SCHEMAS}
    assert DOCUMENT["openapi"].startswith("3.1")
    assert DOCUMENT["info"]["version"] == "1.2.3"
    for item in DOCUMENT["paths"].values():
        for operation in item.values():
            assert operation["responses"]["200"]["content"]


def test_fields_are_described_as_they_are_taken() -> None:
    for kind in (Completion, Chat, TokenGenerate, TokenSampling):
        described = SCHEMAS[kind.__name__]
        assert set(described["properties"]) == {*kind.__struct_fields__, *neutral_of(kind)}
        assert described["additionalProperties"] is False
        for field, values in neutral_of(kind).items():
            assert described["properties"][field]["enum"] == [None, *values]
    (n, _) = SCHEMAS["Chat"]["properties"]["n"]["anyOf"]
    assert (n["minimum"], n["maximum"]) == (1, MAX_N)


async def test_responses_have_the_fields_that_are_described() -> None:
    asked: dict[str, tuple[str, str, dict[str, Any] | None]] = {
        "CompletionResponse": ("POST", "/v1/completions", {"model": "poet", "prompt": "hi"}),
        "ChatResponse": ("POST", "/v1/chat/completions", {"model": "poet", "messages": HI}),
        "TokenResponse": ("POST", "/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
        "Error": ("POST", "/v1/completions", {}),
        "Models": ("GET", "/v1/models", None),
        "Model": ("GET", "/v1/models/poet", None),
        "Tokens": ("POST", "/tokenize", {"prompt": "hi"}),
        "Prompt": ("POST", "/detokenize", {"tokens": [1]}),
        "Deleted": ("POST", "/v1/unload_lora_adapter", {"lora_name": "poet"}),
        "Health": ("GET", "/health", None),
        "Version": ("GET", "/version", None),
    }
    async with session() as api:
        for name, (method, path, body) in asked.items():
            missing = absent((await api.send(method, path, json=body)).json, SCHEMAS[name])
            assert missing == [], (name, missing)
        await api.engine.drain(0)
        assert absent((await api.send("GET", "/health")).json, SCHEMAS["Unhealthy"]) == []


def absent(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Required fields that a response lacks, and constants that it has otherwise."""
    schema = SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "const" in schema:
        return [] if value == schema["const"] else [place]
    if isinstance(value, list):
        return [found for each in value for found in absent(each, schema.get("items", {}), f"{place}[]")]
    if not isinstance(value, dict):
        return []
    missing = [f"{place}.{field}" for field in schema.get("required", ()) if field not in value]
    inner = schema.get("properties", {})
    return missing + [
        found
        for field, each in value.items()
        for found in absent(each, inner.get(field, {}), f"{place}.{field}")
    ]
