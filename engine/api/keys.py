"""Decide what the bearer of a key may do: ask, administer, or nothing. It may not know HTTP's requests.

Keys are kept and compared as SHA-256 digests: every one is compared, in a time that does not depend on any of them.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import sha256
from hmac import compare_digest
from http import HTTPStatus
from typing import Literal

from engine.api.errors import ApiError
from engine.config.access_config import key_name

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
class _Key:
    digest: bytes
    administers: bool
    name: str


class AccessRules:
    """The keys of a server and what each opens. Without API keys everybody may ask."""

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        admin_keys: Sequence[str] = (),
        keyless_admin: KeylessAdmin = "local",
        open_metrics: bool = False,
    ) -> None:
        kinds = ((api_keys, False), (admin_keys, True))
        self._keys = tuple(_Key(_digest(key), admin, key_name(key)) for keys, admin in kinds for key in keys)
        self._asks_openly, self._has_admin_key = not api_keys, bool(admin_keys)
        self._keyless_admin, self._open_metrics = keyless_admin, open_metrics

    def admit(self, needed: Permission, authorization: str | None, is_local: bool) -> str:
        """Return the name of the client's key, "" if it has none. Raises ApiError if it may not do that.

        `authorization` is the header, `is_local` whether the client is certainly on this machine.
        """
        key = self._find(authorization)
        if needed in (Permission.ADMINISTER, Permission.INSPECT):
            self._check_admin(key, is_local)
        elif key is None and not self._asks_openly and not self._opens(needed):
            raise _unauthorised("API key")
        return "" if key is None else key.name

    def _opens(self, needed: Permission) -> bool:
        return needed is Permission.NOTHING or (needed is Permission.METRICS and self._open_metrics)

    def _check_admin(self, key: _Key | None, is_local: bool) -> None:
        if key is None and (self._has_admin_key or not self._asks_openly):
            raise _unauthorised("admin key" if self._has_admin_key else "API key")
        if key is not None and key.administers:
            return
        if self._has_admin_key:
            message = "this key may ask but not administer: send an admin key"
            raise ApiError(HTTPStatus.FORBIDDEN, message, None, "admin_key_required")
        if self._keyless_admin == "nobody" or (self._keyless_admin == "local" and not is_local):
            message = (
                "administration is off for this client, since the server has no admin key: start it with "
                "--admin-key-file or LORASERVE_ADMIN_KEY, or with --allow-admin-without-key"
            )
            raise ApiError(HTTPStatus.FORBIDDEN, message, None, "admin_is_off")

    def _find(self, authorization: str | None) -> _Key | None:
        """Return the key that a header bears; the scheme's case does not matter (RFC 9110)."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        matching = [key for key in self._keys if compare_digest(key.digest, digest)]
        return matching[0] if matching and scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogatepass")).digest()


def _unauthorised(kind: str) -> ApiError:
    message = f"the {kind} is missing or wrong: send it as `Authorization: Bearer KEY`"
    return ApiError(HTTPStatus.UNAUTHORIZED, message, None, "invalid_api_key")
