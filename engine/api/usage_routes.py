"""Tell over HTTP what tenants have used: each its own, and whoever may see the registry that of all."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from http import HTTPStatus

import msgspec
from aiohttp import web

from engine.api.errors import ApiError, refused
from engine.api.guard import RECORD, json_response
from engine.api.openapi.operations import (
    ALWAYS,
    TEXT,
    Description,
    Operation,
    Schema,
    array_schema,
    object_schema,
    ref_schema,
)
from engine.api.server.body import BodyReader
from engine.metrics.series import MetricSeries
from engine.tenants.usage_counts import UsageCount, UsageKey
from engine.tenants.usage_file import UsageQuery
from engine.tenants.usage_log import UsageLog

MOST_ROWS = 10_000
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_PARAMETERS = ("from", "to", "tenant", "adapter")
_QUERY: Mapping[str, Schema] = dict.fromkeys(_PARAMETERS, TEXT)


class DayUsage(msgspec.Struct, frozen=True):
    """What a tenant has used on one day, by one adapter or the base model."""

    day: str
    tenant: str
    adapter: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    refusals: int


DESCRIPTION = Description(
    (Operation("get", "/v1/usage", "Tell what was used", "UsageList", (*ALWAYS, 400), query=_QUERY),),
    {
        "UsageList": object_schema(
            object={"const": "list"}, data=array_schema(ref_schema("DayUsage")), has_more={"type": "boolean"}
        )
    },
    (DayUsage,),
)


class UsageRoutes:
    """The handler of /v1/usage."""

    def __init__(self, usage: UsageLog) -> None:
        self._usage = usage
        self.description = DESCRIPTION

    def table(self, bodies: BodyReader) -> Sequence[web.RouteDef]:
        """List the routes."""
        return [web.get("/v1/usage", self._get, allow_head=False)]

    def series(self) -> tuple[MetricSeries, ...]:
        """Tell none: what tenants use is told by their own series."""
        return ()

    async def _get(self, request: web.Request) -> web.Response:
        record = request[RECORD]
        query = usage_query(request.query, record.tenant, record.sees_all)
        found = await self._usage.read(query)
        rows = [_row(key, count) for key, count in found[:MOST_ROWS]]
        return json_response({"object": "list", "data": rows, "has_more": len(found) > MOST_ROWS})


def usage_query(given: Mapping[str, str], tenant: str, sees_all: bool) -> UsageQuery:
    """Read what is asked for. Raises ApiError for what nobody knows, and for other tenants' usage."""
    for name in given:
        if name not in _PARAMETERS:
            raise refused(name, f"there is no such parameter: give {', '.join(_PARAMETERS)}", "unknown_field")
    first, last = _day(given, "from", "0000-01-01"), _day(given, "to", "9999-12-31")
    if first > last:
        raise refused("from", f"{first!r} is after to={last!r}: give an earlier day", "invalid_value")
    asked = given.get("tenant")
    if asked not in (None, tenant) and not sees_all:
        message = "tenant: this key sees its own usage: leave the parameter out, or send an admin key"
        raise ApiError(HTTPStatus.FORBIDDEN, message, "tenant", "admin_key_required")
    whose = asked if sees_all else tenant
    return UsageQuery(first, last, whose, given.get("adapter"), MOST_ROWS + 1)


def _day(given: Mapping[str, str], name: str, default: str) -> str:
    day = given.get(name)
    if day is None:
        return default
    try:
        if _DAY.fullmatch(day):
            return date.fromisoformat(day).isoformat()
    except ValueError:
        pass
    raise refused(name, f"{day!r:.100} is not accepted: give a day in UTC like 2026-11-30", "invalid_value")


def _row(key: UsageKey, count: UsageCount) -> DayUsage:
    return DayUsage(*key, *count)
