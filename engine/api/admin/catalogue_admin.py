"""Change and describe the registry of adapters for administrators, over whatever protocol they ask."""

from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from engine.api.adapters import AdapterAdmin
from engine.api.admin.admin_schema import AliasAdapter, HoldAdapter, LimitAdapter, PinAdapter, RegisterAdapter
from engine.api.base import EngineClient
from engine.api.errors import ApiError, refused
from engine.api.schema import LoadAdapter
from engine.catalogue.alias_targets import check_targets
from engine.catalogue.base import AdapterRecord, EntrySettings
from engine.runner.step_history import StepRecord

MOST_LISTED, DEFAULT_LISTED = 1000, 100
_HELD_S = 60.0


class CatalogueAdmin:
    """The registry behind `client`. Sources are told as from below an allowed root, never as paths of this machine."""

    def __init__(self, client: EngineClient, adapters: AdapterAdmin) -> None:
        """Register by `adapters`, as clients that load do."""
        self._client, self._adapters = client, adapters

    async def page(self, query: Mapping[str, str]) -> dict[str, object]:
        """Return a page of the registry: `limit` names after the name `after`. Raises ApiError."""
        for field in query:
            if field not in ("after", "limit"):
                raise refused(field, "no such field: give after or limit", "unknown_field")
        given = query.get("limit", str(DEFAULT_LISTED))
        if not (given.isascii() and given.isdecimal() and 1 <= int(given[:9]) <= MOST_LISTED):
            raise refused("limit", f"give 1 to {MOST_LISTED}", "invalid_value")
        limit = int(given)
        found = await self._client.catalogue.records(query.get("after", "")[:256], limit + 1)
        data, more = found[:limit], len(found) > limit
        listed = [self._told(record) for record in data]
        return {"object": "list", "data": listed, "has_more": more, "next": data[-1].name if more else None}

    async def one(self, name: str) -> dict[str, object]:
        """Describe one name. Raises UnknownModel."""
        return self._told(await self._client.catalogue.record(name))

    async def cluster(self) -> dict[str, object]:
        """Describe the cluster."""
        return msgspec.to_builtins(await self._client.catalogue.cluster())

    def steps(self) -> list[StepRecord]:
        """Describe the last steps. Raises ApiError at a router."""
        found = self._client.recent_steps()
        if found is None:
            message = "a router computes no steps: ask a node, at its own HTTP port"
            raise ApiError(HTTPStatus.NOT_FOUND, message, None, "ask_a_node")
        return list(found)

    async def register(self, wire: RegisterAdapter) -> dict[str, object]:
        """Register a folder under a name, with what is asked for it. Raises as AdapterAdmin.load."""
        body = LoadAdapter(lora_name=wire.name, lora_path=wire.source, load_inplace=wire.replace is True)
        await self._adapters.load(body)
        if wire.copies is not None or wire.max_requests is not None:
            await self._client.catalogue.set(wire.name, EntrySettings(wire.copies, wire.max_requests))
        return await self.one(wire.name)

    async def alias(self, wire: AliasAdapter) -> dict[str, object]:
        """Let a name mean what another means, or lead to several by share.

        Raises ApiError, InvalidParameter, InvalidAdapterName, UnknownModel.
        """
        targets = wire.targets or ()
        target = targets[0].name if targets else wire.target
        if target is None or (targets and wire.target is not None):
            raise refused("target", "give either target or targets", "invalid_value")
        if targets:
            check_targets(wire.name, targets)
        elif wire.name == target:
            raise refused("target", "it is the name itself: give another", "invalid_value")
        await self._client.catalogue.set_alias(wire.name, target, targets if len(targets) > 1 else ())
        return await self.one(wire.name)

    async def pin(self, wire: PinAdapter) -> dict[str, object]:
        """Keep at least so many copies, one if no number is given. Raises UnknownModel, InvalidParameter."""
        return await self._set(wire.name, EntrySettings(pinned=wire.copies or 1))

    async def unpin(self, name: str) -> dict[str, object]:
        """Keep as many copies as is thought best. Raises UnknownModel."""
        return await self._set(name, EntrySettings(pinned=0))

    async def limit(self, wire: LimitAdapter) -> dict[str, object]:
        """Bound the requests under way by a name. Raises UnknownModel."""
        return await self._set(wire.name, EntrySettings(max_requests=wire.max_requests))

    async def hold(self, wire: HoldAdapter) -> dict[str, object]:
        """Let a name take no requests for a while. Raises UnknownModel."""
        await self._client.catalogue.hold(wire.name, _HELD_S if wire.seconds is None else wire.seconds)
        return await self.one(wire.name)

    async def release(self, name: str) -> dict[str, object]:
        """Let a name take requests again. Raises UnknownModel."""
        await self._client.catalogue.release(name)
        return await self.one(name)

    async def abort(self, name: str) -> dict[str, object]:
        """End the requests under a name. Raises UnknownModel."""
        return {"id": name, "object": "adapter", "aborted": await self._client.catalogue.abort(name)}

    async def remove(self, name: str) -> dict[str, object]:
        """Let a name mean nothing. Raises UnknownModel."""
        await self._client.unload_adapter(name)
        return {"id": name, "object": "adapter", "deleted": True}

    async def _set(self, name: str, settings: EntrySettings) -> dict[str, object]:
        await self._client.catalogue.set(name, settings)
        return await self.one(name)

    def _told(self, record: AdapterRecord) -> dict[str, object]:
        """Write a record, with its source as clients may know it."""
        source = self._adapters.source(record.name, record.source)
        fields: dict[str, object] = msgspec.to_builtins(record)
        return {"object": "adapter"} | fields | {"source": source}
