"""Serve loraserve.Adapters: the registry of adapters, by the same functions as HTTP's /v1/adapters."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict

from engine.api.admin.admin_schema import AliasAdapter, HoldAdapter, LimitAdapter, PinAdapter, RegisterAdapter
from engine.api.admin.catalogue_admin import DEFAULT_LISTED, CatalogueAdmin
from engine.api.errors import refused
from engine.api.keys import Permission
from engine.api.schema import converted
from engine.errors import AdapterExists
from engine.rpc.rpc_guard import RpcCall, RpcMethod, one_answer
from engine.rpc.wire import adapters_pb2 as wire

ADAPTERS = "loraserve.Adapters"
_FIELDS = {"lora_name": "name", "lora_path": "source"}


class AdaptersService:
    """Answers administrators, on a single server and on a router."""

    def __init__(self, admin: CatalogueAdmin) -> None:
        self._admin = admin

    def methods(self) -> tuple[RpcMethod, ...]:
        """List the calls."""
        inspect, administer = Permission.INSPECT, Permission.ADMINISTER
        return (
            one_answer("List", inspect, wire.ListAdaptersRequest, self._list),
            one_answer("Get", inspect, wire.GetAdapterRequest, self._get),
            one_answer("Load", administer, wire.LoadAdapterRequest, self._load, _FIELDS),
            one_answer("Unload", administer, wire.UnloadAdapterRequest, self._unload),
            one_answer("Pin", administer, wire.PinAdapterRequest, self._pin),
            one_answer("Unpin", administer, wire.UnpinAdapterRequest, self._unpin),
            one_answer("SetAlias", administer, wire.SetAliasRequest, self._set_alias, _FIELDS),
            one_answer("SetLimit", administer, wire.SetLimitRequest, self._set_limit),
            one_answer("Hold", administer, wire.HoldAdapterRequest, self._hold),
            one_answer("Release", administer, wire.ReleaseAdapterRequest, self._release),
            one_answer("Abort", administer, wire.AbortAdapterRequest, self._abort),
        )

    async def _list(self, message: wire.ListAdaptersRequest, call: RpcCall) -> wire.ListAdaptersResponse:
        limit = str(message.limit or DEFAULT_LISTED)
        page: Any = await self._admin.page({"after": message.after, "limit": limit})
        listed = [_adapter(each) for each in page["data"]]
        return wire.ListAdaptersResponse(adapters=listed, next=page["next"] or "")

    async def _get(self, message: wire.GetAdapterRequest, call: RpcCall) -> wire.Adapter:
        return _adapter(await self._admin.one(message.name))

    async def _load(self, message: wire.LoadAdapterRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        fields = {"name": message.name, "source": message.source, "replace": message.replace}
        for field in ("copies", "max_requests"):
            if message.HasField(field):  # type: ignore[arg-type]
                fields[field] = getattr(message, field)
        try:
            return _adapter(await self._admin.register(converted(fields, RegisterAdapter)))
        except AdapterExists:
            told = f"{message.name!r} is loaded already: unload it, or give replace=true"
            raise refused("name", told, "adapter_exists") from None

    async def _unload(self, message: wire.UnloadAdapterRequest, call: RpcCall) -> wire.UnloadAdapterResponse:
        call.record.model = message.name
        await self._admin.remove(message.name)
        return wire.UnloadAdapterResponse()

    async def _pin(self, message: wire.PinAdapterRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        copies = message.copies if message.HasField("copies") else None
        return _adapter(
            await self._admin.pin(converted({"name": message.name, "copies": copies}, PinAdapter))
        )

    async def _unpin(self, message: wire.UnpinAdapterRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        return _adapter(await self._admin.unpin(message.name))

    async def _set_alias(self, message: wire.SetAliasRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        targets = [{"name": each.name, "share": each.share} for each in message.targets]
        fields = {"name": message.name, "target": message.target or None, "targets": targets or None}
        return _adapter(await self._admin.alias(converted(fields, AliasAdapter)))

    async def _set_limit(self, message: wire.SetLimitRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        fields = {"name": message.name, "max_requests": message.max_requests}
        return _adapter(await self._admin.limit(converted(fields, LimitAdapter)))

    async def _hold(self, message: wire.HoldAdapterRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        seconds = message.seconds if message.HasField("seconds") else None
        fields = {"name": message.name, "seconds": seconds}
        return _adapter(await self._admin.hold(converted(fields, HoldAdapter)))

    async def _release(self, message: wire.ReleaseAdapterRequest, call: RpcCall) -> wire.Adapter:
        call.record.model = message.name
        return _adapter(await self._admin.release(message.name))

    async def _abort(self, message: wire.AbortAdapterRequest, call: RpcCall) -> wire.AbortAdapterResponse:
        call.record.model = message.name
        told: dict[str, Any] = await self._admin.abort(message.name)
        return wire.AbortAdapterResponse(aborted=told["aborted"])


def _adapter(told: Mapping[str, object]) -> wire.Adapter:
    """Write what HTTP's administrators are told; the declaration has the same fields."""
    return ParseDict({name: value for name, value in told.items() if name != "object"}, wire.Adapter())
