"""Read a TOML file of tenants. Whatever is not accepted is told by its table, field and value, with the remedy.

No key stands in the file, so that it may be shown and kept under version control: a tenant names a file of keys, or
gives the SHA-256 of each.
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from engine.tenants.tenant import Tenant, TenantLimits, key_digest
from lora.format.adapter_files import Flaw, read_regular_file
from scheduler.request import MAX_PRIORITY

_MOST_BYTES, _MOST_KEY_BYTES = 1 << 22, 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_NAME = re.compile(r"[0-9a-f]{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[!-+\--~]+")  # printable ASCII without spaces or commas
_MOST = 2**53
_HIGHEST_PRIORITY, _LOWEST_PRIORITY = -100, 100


class TenantsFlaw(ValueError):
    """What is wrong with a file of tenants: its message is for the operator."""


@dataclass(frozen=True, slots=True)
class _Field:
    """What a field may hold, and what an operator is told otherwise."""

    accepts: Callable[[Any], bool]
    remedy: str


def _whole(low: int, high: int) -> _Field:
    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return _Field(accepts, f"give a whole number from {low} to {high}")


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-3 <= value <= 1e3


def _are_texts(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, str) and pattern.fullmatch(item) is not None for item in cast(list[object], value)
    )


_AMOUNT = _whole(1, _MOST)
_LIMIT_FIELDS = {"requests_per_minute": _AMOUNT, "tokens_per_minute": _AMOUNT, "concurrent": _AMOUNT}
_TENANT_FIELDS = {
    "key_file": _Field(lambda value: isinstance(value, str) and bool(value.strip()), "give a file's path"),
    "key_digests": _Field(
        lambda value: _are_texts(value, _DIGEST),
        "give a list of SHA-256 digests in 64 lower-case hexadecimal digits, as sha256sum writes them",
    ),
    "adapters": _Field(
        lambda value: _are_texts(value, re.compile(r".{1,256}")), 'give a list of patterns, like ["acme-*"]'
    ),
    "base": _Field(lambda value: isinstance(value, bool), "give true or false"),
    "weight": _Field(_is_weight, "give a number from 0.001 to 1000"),
    "priority": _whole(_HIGHEST_PRIORITY, _LOWEST_PRIORITY),
    "limits": _Field(
        lambda value: isinstance(value, Mapping), "give a table of limits by patterns of adapters' names"
    ),
    **_LIMIT_FIELDS,
}
assert MAX_PRIORITY >= _LOWEST_PRIORITY - _HIGHEST_PRIORITY, "every class can be asked"


def read_tenants(path: Path) -> tuple[Tenant, ...]:
    """Read the tenants of a file, and the files of keys that it names. Raises TenantsFlaw."""
    try:
        content = tomllib.loads(_text(path, _MOST_BYTES))
    except Flaw as error:
        raise TenantsFlaw(f"it cannot be read ({error}): give a file of tenants") from error
    except (ValueError, RecursionError) as error:
        raise TenantsFlaw(f"it is no TOML ({error}): mend that") from error
    tables = content.pop("tenants", None)
    if content:
        raise TenantsFlaw(f"it has the unknown key {next(iter(content))!r}: write tables like [tenants.acme]")
    if not isinstance(tables, dict) or not tables:
        raise TenantsFlaw("it has no tenant: write a table like [tenants.acme] for each")
    found = tuple(_tenant(name, table, path.parent) for name, table in cast(dict[str, Any], tables).items())
    _check_distinct(found)
    return found


def _tenant(name: str, table: Any, folder: Path) -> Tenant:
    title = f"[tenants.{name}]"
    if not _NAME.fullmatch(name):
        raise TenantsFlaw(f"{title}: name it by at most 64 letters, digits or any of ._-")
    if _KEY_NAME.fullmatch(name):
        raise TenantsFlaw(f"{title}: keys without a tenant have such names: give another")
    if not isinstance(table, dict):
        raise TenantsFlaw(f"tenants.{name} is {table!r:.80}: write a table {title}")
    fields = _checked(title, cast(dict[str, Any], table), _TENANT_FIELDS)
    digests = {*fields.get("key_digests", ()), *_digests_of(title, fields.get("key_file"), folder)}
    if not digests:
        raise TenantsFlaw(f"{title} has no key, so nobody can use it: give key_file or key_digests")
    return Tenant(
        name=name,
        key_digests=frozenset(digests),
        adapters=tuple(fields.get("adapters", ("*",))),
        base=fields.get("base", True),
        limits=_limits(fields),
        adapter_limits=_adapter_limits(name, fields.get("limits", {})),
        weight=float(fields.get("weight", 1.0)),
        priority=fields.get("priority", 0),
    )


def _adapter_limits(name: str, tables: Mapping[str, Any]) -> tuple[tuple[str, TenantLimits], ...]:
    found: list[tuple[str, TenantLimits]] = []
    for pattern, table in tables.items():
        title = f"[tenants.{name}.limits.{pattern!r}]"
        if not isinstance(table, dict):
            raise TenantsFlaw(f"{title} is {table!r:.80}: write a table of limits")
        found.append((pattern, _limits(_checked(title, cast(dict[str, Any], table), _LIMIT_FIELDS))))
    return tuple(found)


def _limits(fields: Mapping[str, Any]) -> TenantLimits:
    return TenantLimits(**{name: fields.get(name) for name in _LIMIT_FIELDS})


def _checked(title: str, table: dict[str, Any], known: Mapping[str, _Field]) -> dict[str, Any]:
    """Return a table whose fields are all known and accepted. Raises TenantsFlaw."""
    for field, value in table.items():
        if field not in known:
            near = get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(known)}"
            raise TenantsFlaw(f"{title} has the unknown field {field!r}: {hint}")
        if not known[field].accepts(value):
            raise TenantsFlaw(f"{title} {field} = {value!r:.80} is not accepted: {known[field].remedy}")
    return table


def _digests_of(title: str, file: str | None, folder: Path) -> Sequence[str]:
    """Return the digests of a file's keys, one a line. A key is never told."""
    if file is None:
        return ()
    try:
        text = _text(folder / Path(file).expanduser(), _MOST_KEY_BYTES)
    except Flaw as error:
        remedy = "give a file with one key a line"
        raise TenantsFlaw(f"{title} key_file = {file!r} cannot be used ({error}): {remedy}") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line]
    if not keys or not all(_KEY.fullmatch(key) for key in keys):
        remedy = "write one key a line, of printable ASCII without spaces and commas"
        raise TenantsFlaw(f"{title} key_file = {file!r} cannot be used: {remedy}")
    return [key_digest(key) for key in keys]


def _text(path: Path, most_bytes: int) -> str:
    """Return the text of a regular file. Raises Flaw."""
    try:
        return bytes(read_regular_file(path, most_bytes)).decode("utf-8-sig")
    except OSError as error:
        raise Flaw(error.strerror or "it cannot be read") from error
    except ValueError as error:
        raise Flaw("it is no text") from error


def _check_distinct(tenants: Sequence[Tenant]) -> None:
    """Raise TenantsFlaw where a key would stand for two tenants, or two keys have one name in logs."""
    owners: dict[str, str] = {}
    for tenant in tenants:
        for digest in sorted(tenant.key_digests):
            other = owners.setdefault(digest[:8], tenant.name)
            if other != tenant.name:
                told = f"[tenants.{other}] and [tenants.{tenant.name}] have a key that logs call {digest[:8]}"
                raise TenantsFlaw(f"{told}: give each its own")
