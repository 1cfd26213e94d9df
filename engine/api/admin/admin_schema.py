"""Declare what administrators send of the registry of adapters, as msgspec structs, with the bounds of each field."""

from typing import Annotated

import msgspec

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import MOST_COPIES, MOST_HELD_S, MOST_REQUESTS

Copies = Annotated[int, msgspec.Meta(ge=1, le=MOST_COPIES)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=MOST_HELD_S)]
Requests = Annotated[int, msgspec.Meta(ge=0, le=MOST_REQUESTS)]


class RegisterAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters. `source` is a folder below an allowed root; a name that is there needs `replace`."""

    name: str
    source: str
    replace: bool | None = None
    copies: Copies | None = None
    max_requests: Requests | None = None


class AliasAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/alias: let `name` mean what `target` means now, or lead to `targets` by share."""

    name: str
    target: str | None = None
    targets: Targets | None = None


class PinAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/pin: keep at least so many `copies`."""

    name: str
    copies: Copies | None = None


class UnpinAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/unpin."""

    name: str


class HoldAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/hold: let a name take no requests for so many `seconds`, a minute if none are given."""

    name: str
    seconds: Seconds | None = None


class ReleaseAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/release: undo a hold."""

    name: str


class AbortAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/abort: end the requests under a name, with what they have."""

    name: str


class LimitAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/adapters/limit: how many requests may be under way at one server by the name; 0 for any number."""

    name: str
    max_requests: Requests
