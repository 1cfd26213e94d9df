"""Keep what tenants have used in an SQLite file in WAL mode: a row for each day, tenant and adapter.

Processes of one machine may share a file: each adds to the rows. All calls block: they belong in a thread, one at a
time.
"""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidConfig
from engine.tenants.usage_counts import UsageCount, UsageKey

_FORMAT = 1
_BUSY_S = 5.0
_SCHEMA = """
create table if not exists usage (
    day text not null, tenant text not null, adapter text not null, requests integer not null,
    prompt_tokens integer not null, cached_tokens integer not null, completion_tokens integer not null,
    refusals integer not null, primary key (day, tenant, adapter)
) without rowid
"""
_NUMBERS = UsageCount._fields
_ADD = (
    f"insert into usage (day, tenant, adapter, {', '.join(_NUMBERS)}) values (?, ?, ?, ?, ?, ?, ?, ?) "
    "on conflict (day, tenant, adapter) do update set "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in _NUMBERS)
)
_READ = (
    f"select day, tenant, adapter, {', '.join(_NUMBERS)} from usage where day >= ? and day <= ? "
    "and (? is null or tenant = ?) and (? is null or adapter = ?) order by day, tenant, adapter limit ?"
)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which rows are wanted: those of some days, the first and the last included, at most `most`."""

    first_day: str
    last_day: str
    tenant: str | None = None
    adapter: str | None = None
    most: int = 10_000


class UsageFile:
    """The rows of one file."""

    def __init__(self, path: Path) -> None:
        """Open or begin a file. Raises InvalidConfig if it cannot be used."""
        try:
            self._database = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = full")
            ((found,),) = self._database.execute("pragma user_version")
            if found not in (0, _FORMAT):
                raise sqlite3.DatabaseError(f"it is of format {found}, and this version reads {_FORMAT}")
            self._database.execute(_SCHEMA)
            self._database.execute(f"pragma user_version = {_FORMAT}")
        except sqlite3.Error as error:
            remedy = f"it is no file of usage that can be used ({error}): give another, or mend this one"
            raise InvalidConfig("usage_file", str(path), remedy) from error

    def add(self, counts: Mapping[UsageKey, UsageCount]) -> None:
        """Add to the rows, all or none. What has returned is there whenever the process stops. Raises sqlite3.Error."""
        self._database.execute("begin immediate")
        try:
            self._database.executemany(_ADD, [(*key, *count) for key, count in counts.items()])
        except BaseException:
            self._database.execute("rollback")
            raise
        self._database.execute("commit")

    def read(self, query: UsageQuery) -> list[tuple[UsageKey, UsageCount]]:
        """Return rows, in order. Raises sqlite3.Error."""
        tenant, adapter = query.tenant, query.adapter
        asked = (query.first_day, query.last_day, tenant, tenant, adapter, adapter, query.most)
        return [(UsageKey(*row[:3]), UsageCount(*row[3:])) for row in self._database.execute(_READ, asked)]

    def forget_before(self, day: str) -> None:
        """Delete the rows of earlier days. Raises sqlite3.Error."""
        self._database.execute("delete from usage where day < ?", (day,))

    def close(self) -> None:
        """Close the file."""
        self._database.close()
