"""Decide what the bearer of a key may do: ask, administer, or nothing. It may not know HTTP's requests.

Keys are kept and compared as SHA-256 digests: every one is compared, in a time that does not depend on any of them.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hmac import compare_digest
from http import HTTPStatus
from typing import Literal

from engine.api.errors import ApiError
from engine.config.access_config import key_name
from engine.tenants.tenant import Tenant, key_digest

KeylessAdmin = Literal["nobody", "local", "everybody"]
"""Who may administer where there is no admin key: `local` means clients on this machine."""
_NOT_DIRECT = frozenset({"forwarded", "x-forwarded-for", "x-real-ip", "via", "origin"})


def is_local(host: str | None, headers: Iterable[str]) -> bool:
    """Tell whether a client is a program on this machine: no proxy, and no web page in a browser here.

    What the headers say is not believed, only that they are there.
    """
    if not host or _NOT_DIRECT & {name.lower() for name in headers}:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Permission(Enum):
    """What the client of a route must have. Who may administer may inspect, and nobody else; audits are of changes."""

    NOTHING = auto()
    METRICS = auto()
    ASK = auto()
    INSPECT = auto()
    ADMINISTER = auto()


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who asks: the name of its key and the tenant of that, "" without a key, and whether it may see everybody's."""

    key: str = ""
    tenant: str = ""
    sees_all: bool = False


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes
    administers: bool
    name: str


class AccessRules:
    """The keys of a server and what each opens. Without API keys everybody may ask. Used on one event loop."""

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        admin_keys: Sequence[str] = (),
        keyless_admin: KeylessAdmin = "local",
        open_metrics: bool = False,
        tenants: Iterable[Tenant] = (),
    ) -> None:
        kinds = ((api_keys, False), (admin_keys, True))
        self._own_keys = tuple(
            _Key(bytes.fromhex(key_digest(key)), admin, key_name(key))
            for keys, admin in kinds
            for key in keys
        )
        self._has_api_key, self._has_admin_key = bool(api_keys), bool(admin_keys)
        self._keyless_admin, self._open_metrics = keyless_admin, open_metrics
        self.adopt(tenants)

    def adopt(self, tenants: Iterable[Tenant]) -> None:
        """Let in the keys of these tenants from now on, and no longer those of former ones."""
        self._tenants = {digest: tenant.name for tenant in tenants for digest in tenant.key_digests}
        given = tuple(_Key(bytes.fromhex(digest), False, digest[:8]) for digest in self._tenants)
        self._keys = (*self._own_keys, *given)
        self._asks_openly = not (self._has_api_key or self._tenants)

    def admit(self, needed: Permission, authorization: str | None, is_local: bool) -> Bearer:
        """Return who the client is. Raises ApiError if it may not do that.

        `authorization` is the header, `is_local` whether the client is certainly on this machine.
        """
        key = self._find(authorization)
        if needed is Permission.METRICS and self._tenants and not self._open_metrics:
            needed = Permission.INSPECT  # metrics tell of all tenants' adapters
        if needed in (Permission.ADMINISTER, Permission.INSPECT):
            self._check_admin(key, is_local)
        elif key is None and not self._asks_openly and not self._opens(needed):
            raise _unauthorised("API key")
        if key is None:
            return Bearer(sees_all=not self._has_admin_key and self._administers_keyless(is_local))
        tenant = self._tenants.get(key.digest.hex(), key.name)
        sees_all = key.administers or (not self._has_admin_key and self._administers_keyless(is_local))
        return Bearer(key.name, tenant, sees_all)

    def _opens(self, needed: Permission) -> bool:
        return needed is Permission.NOTHING or (needed is Permission.METRICS and self._open_metrics)

    def _administers_keyless(self, is_local: bool) -> bool:
        return self._keyless_admin == "everybody" or (self._keyless_admin == "local" and is_local)

    def _check_admin(self, key: _Key | None, is_local: bool) -> None:
        if key is None and (self._has_admin_key or not self._asks_openly):
            raise _unauthorised("admin key" if self._has_admin_key else "API key")
        if key is not None and key.administers:
            return
        if self._has_admin_key:
            message = "this key may ask but not administer: send an admin key"
            raise ApiError(HTTPStatus.FORBIDDEN, message, None, "admin_key_required")
        if not self._administers_keyless(is_local):
            message = (
                "administration is off for this client, since the server has no admin key: start it with "
                "--admin-key-file or LORASERVE_ADMIN_KEY, or with --allow-admin-without-key"
            )
            raise ApiError(HTTPStatus.FORBIDDEN, message, None, "admin_is_off")

    def _find(self, authorization: str | None) -> _Key | None:
        """Return the key that a header bears; the scheme's case does not matter (RFC 9110)."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = bytes.fromhex(key_digest(given.strip()))
        matching = [key for key in self._keys if compare_digest(key.digest, digest)]
        return matching[0] if matching and scheme.lower() == "bearer" else None


def _unauthorised(kind: str) -> ApiError:
    message = f"the {kind} is missing or wrong: send it as `Authorization: Bearer KEY`"
    return ApiError(HTTPStatus.UNAUTHORIZED, message, None, "invalid_api_key")
