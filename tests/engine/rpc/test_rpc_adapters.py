"""The registry of adapters over gRPC: what HTTP's administrators are told, by the same rules."""

from pathlib import Path
from typing import Any

import aiohttp
import grpc
from google.protobuf.json_format import MessageToDict

from engine.config.access_config import AccessConfig
from engine.config.config import ServeConfig
from engine.rpc.wire import adapters_pb2 as wire
from tests.engine.rpc.door import Door, at_door, refusal

ANSWERS = {
    "List": wire.ListAdaptersResponse,
    "Unload": wire.UnloadAdapterResponse,
    "Abort": wire.AbortAdapterResponse,
}


async def call(door: Door, name: str, message: Any, key: str | None = None) -> Any:
    method = door.channel.unary_unary(
        f"/loraserve.Adapters/{name}",
        request_serializer=type(message).SerializeToString,
        response_deserializer=ANSWERS.get(name, wire.Adapter).FromString,
    )
    return await method(message, metadata=(("authorization", f"Bearer {key}"),) if key else None)


def adapter_folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    (root / name / "adapter_config.json").write_text("{}")
    return root / name


def test_an_adapter_is_told_as_over_http() -> None:
    async def scenario(door: Door) -> None:
        told = await call(door, "Get", wire.GetAdapterRequest(name="poet"))
        async with aiohttp.ClientSession(door.http) as http:
            by_http = await (await http.get("/v1/adapters/poet")).json()
        like = {name: value for name, value in by_http.items() if name != "object" and value}
        assert MessageToDict(told, preserving_proto_field_name=True) == like
        assert set(by_http) - {"object"} == {field.name for field in wire.Adapter.DESCRIPTOR.fields}

    at_door(scenario)


def test_names_are_listed_a_page_at_a_time() -> None:
    async def scenario(door: Door) -> None:
        first = await call(door, "List", wire.ListAdaptersRequest(limit=1))
        assert ([each.name for each in first.adapters], first.next) == (["poet"], "poet")
        last = await call(door, "List", wire.ListAdaptersRequest(after="poet"))
        assert ([each.name for each in last.adapters], last.next) == (["team/coder"], "")
        code, details = await refusal(call(door, "List", wire.ListAdaptersRequest(limit=1001)))
        assert (code, "limit" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)

    at_door(scenario)


def test_an_adapter_is_loaded_pinned_aliased_bounded_and_unloaded(tmp_path: Path) -> None:
    source = str(adapter_folder(tmp_path, "new"))

    async def scenario(door: Door) -> None:
        load = wire.LoadAdapterRequest(name="new", source=source, copies=2, max_requests=9)
        told = await call(door, "Load", load)
        assert (told.name, told.version, told.pinned, told.max_requests) == ("new", "new", 2, 9)
        assert (await call(door, "Unpin", wire.UnpinAdapterRequest(name="new"))).pinned == 0
        assert (await call(door, "Pin", wire.PinAdapterRequest(name="new"))).pinned == 1
        assert (await call(door, "SetLimit", wire.SetLimitRequest(name="new"))).max_requests == 0
        held = await call(door, "Hold", wire.HoldAdapterRequest(name="new", seconds=9))
        assert held.HasField("held_s")
        assert 0 < held.held_s <= 9
        assert not (await call(door, "Release", wire.ReleaseAdapterRequest(name="new"))).HasField("held_s")
        assert (await call(door, "Abort", wire.AbortAdapterRequest(name="new"))).aborted == 0
        alias = await call(door, "SetAlias", wire.SetAliasRequest(name="newest", target="new"))
        assert (alias.name, alias.alias_of) == ("newest", "new")
        shares = [wire.AliasTarget(name="new", share=0.75), wire.AliasTarget(name="poet", share=0.25)]
        alias = await call(door, "SetAlias", wire.SetAliasRequest(name="newest", targets=shares))
        assert (alias.alias_of, list(alias.targets)) == ("new", shares)
        await call(door, "Unload", wire.UnloadAdapterRequest(name="new"))
        code, _ = await refusal(call(door, "Get", wire.GetAdapterRequest(name="new")))
        assert code is grpc.StatusCode.NOT_FOUND

    at_door(scenario, ServeConfig(lora_roots=(tmp_path,)))


def test_refusals_have_the_protocols_codes_and_words(tmp_path: Path) -> None:
    source = str(adapter_folder(tmp_path, "new"))
    refused = [
        ("Load", wire.LoadAdapterRequest(name="poet", source=source), "ALREADY_EXISTS", "give replace=true"),
        ("Load", wire.LoadAdapterRequest(name="a b", source=source), "INVALID_ARGUMENT", "name='a b'"),
        ("Load", wire.LoadAdapterRequest(name="new", source="/etc"), "PERMISSION_DENIED", "source: "),
        (
            "Load",
            wire.LoadAdapterRequest(name="new", source=source, copies=0),
            "INVALID_ARGUMENT",
            "copies: ",
        ),
        ("Pin", wire.PinAdapterRequest(name="poet", copies=0), "INVALID_ARGUMENT", "copies: "),
        ("Pin", wire.PinAdapterRequest(name="nobody"), "NOT_FOUND", "nobody"),
        ("Hold", wire.HoldAdapterRequest(name="poet", seconds=-1), "INVALID_ARGUMENT", "seconds: "),
        ("Abort", wire.AbortAdapterRequest(name="nobody"), "NOT_FOUND", "nobody"),
        (
            "SetLimit",
            wire.SetLimitRequest(name="poet", max_requests=2**31),
            "INVALID_ARGUMENT",
            "max_requests",
        ),
        ("SetAlias", wire.SetAliasRequest(name="poet", target="poet"), "INVALID_ARGUMENT", "target: "),
        ("SetAlias", wire.SetAliasRequest(name="x"), "INVALID_ARGUMENT", "target: "),
        (
            "SetAlias",
            wire.SetAliasRequest(name="x", targets=[wire.AliasTarget(name="poet", share=0.5)]),
            "INVALID_ARGUMENT",
            "targets.share: [0.5]",
        ),
        (
            "SetAlias",
            wire.SetAliasRequest(name="x", targets=[wire.AliasTarget(name="poet")]),
            "INVALID_ARGUMENT",
            "targets[0].share",
        ),
        ("Unload", wire.UnloadAdapterRequest(name="nobody"), "NOT_FOUND", "nobody"),
    ]

    async def scenario(door: Door) -> None:
        for name, message, code, words in refused:
            found, details = await refusal(call(door, name, message))
            assert (found.name, words in details) == (code, True), (name, found, details)

    at_door(scenario, ServeConfig(lora_roots=(tmp_path,)))


def test_only_admins_see_and_change_the_registry() -> None:
    async def scenario(door: Door) -> None:
        for method in wire.DESCRIPTOR.services_by_name["Adapters"].methods:
            asks = getattr(wire, method.input_type.name)(
                **({} if method.name == "List" else {"name": "nobody"})
            )
            denied, _ = await refusal(call(door, method.name, asks, "ask-key-1234"))
            assert denied is grpc.StatusCode.PERMISSION_DENIED, method.name
        assert (await call(door, "List", wire.ListAdaptersRequest(), "admin-key-1234")).adapters

    access = AccessConfig(api_keys=("ask-key-1234",), admin_keys=("admin-key-1234",))
    at_door(scenario, ServeConfig(access=access))
