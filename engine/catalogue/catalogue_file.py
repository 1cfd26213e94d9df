"""Keep the catalogue of adapters on disk, so that its owner knows every name it has confirmed when it starts anew.

SQLite in WAL mode: a write that has returned is there whenever the process or the machine stops. The owner with the
largest epoch leads; whoever led before can write no more. All calls block: they belong in a thread.
"""

import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import CatalogueEntry
from engine.errors import EngineError, InvalidConfig
from lora.adapter import AdapterRef, Effect, is_name
from lora.format.adapter_files import Flaw
from lora.format.companions import parse_companions, write_companions

_FORMAT = 4
_EPOCHS_BEGIN_S = 1_735_689_600  # 2025-01-01: epochs are seconds since then, and fit into 31 bits until 2093
_BUSY_S = 5.0
_EFFECTS = (None, *get_args(Effect))
_SCHEMA = """
create table if not exists settings (key text primary key, value integer not null) without rowid;
create table if not exists names (
    name text primary key, digest text not null, content_name text not null, rank integer not null,
    sites text not null, bytes integer not null, root text not null, companions text not null, effect text,
    pinned integer not null, owner text not null
) without rowid;
"""
_LATER_FORMATS = {
    2: (
        "alter table names add column alias_of text not null default ''",
        "alter table names add column max_requests integer not null default 0",
    ),
    3: ("alter table names add column invocation text not null default '[]'",),
    4: ("alter table names add column targets text not null default '[]'",),
}
_MEANING = "digest, content_name, rank, sites, bytes, invocation, root, companions, effect"
_COLUMNS = f"name, {_MEANING}, pinned, owner, alias_of, max_requests, targets"
_ALIAS = f"""
insert or replace into names ({_COLUMNS})
    select :name, {_MEANING}, coalesce((select pinned from names where name = :name), 0), '', :target,
    coalesce((select max_requests from names where name = :name), 0), :targets
    from names where name = :target
"""


class Superseded(EngineError):
    """Another coordinator or server has begun with the same catalogue: this one leads no more."""

    def __init__(self, epoch: int, leading: int) -> None:
        super().__init__(
            f"a process of epoch {leading} has taken over the catalogue from epoch {epoch}: "
            "let this one end, or give it a --registry-file of its own"
        )


class NotWritten(EngineError):
    """The catalogue's file did not take a change, which is not made therefore."""

    def __init__(self, path: Path | None, error: sqlite3.Error) -> None:
        super().__init__(
            f"the catalogue of adapters ({path}) cannot be written ({error}): nothing is kept of it"
        )


@dataclass(frozen=True, slots=True)
class RegisteredName:
    """A name of the catalogue; `owner` is the node whose own options declare it, "" if it was registered."""

    entry: CatalogueEntry
    owner: str = ""


class CatalogueFile:
    """The names and what they mean, in one file. One thread at a time may call it."""

    def __init__(self, path: Path | None, now_s: float) -> None:
        """Open or begin a catalogue, in memory only if there is no path, and take the lead over it.

        Raises InvalidConfig for a file that is no catalogue or cannot be written.
        """
        self._path = path
        with self._refused():
            self._database = sqlite3.connect(
                path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                self.epoch = self._begin(now_s)
            except BaseException:
                self._database.close()
                raise

    def read(self) -> dict[str, RegisteredName]:
        """Return all names. Raises InvalidConfig for a row that is no name of a catalogue."""
        with self._refused():
            rows = self._database.execute(f"select {_COLUMNS} from names order by name").fetchall()
            return {row[0]: _registered(row) for row in rows}

    def put(self, registered: RegisteredName) -> None:
        """Let a name mean this from now on. Raises Superseded or NotWritten, as all that writes."""
        values = _row(registered)
        marks = ", ".join("?" * len(values))
        statement = f"insert or replace into names ({_COLUMNS}) values ({marks})"
        self._write(lambda: self._database.execute(statement, values))

    def remove(self, name: str) -> None:
        """Forget a name."""
        self._write(lambda: self._database.execute("delete from names where name = ?", (name,)))

    def set_alias(self, name: str, target: str, targets: Targets = ()) -> None:
        """Let `name` mean, from now on, what `target` means now, in one step. What was asked for it stays."""
        values = {"name": name, "target": target, "targets": msgspec.json.encode(targets).decode()}
        self._write(lambda: self._database.execute(_ALIAS, values))

    def check_leads(self) -> None:
        """Raise Superseded if another coordinator has taken the lead."""
        leading = self._setting("epoch")
        if leading != self.epoch:
            raise Superseded(self.epoch, leading)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _begin(self, now_s: float) -> int:
        self._database.execute("pragma journal_mode = wal")
        self._database.execute("pragma synchronous = full")
        self._database.executescript(_SCHEMA)
        with self._transaction():
            found = self._setting("format")
            if not 0 <= found <= _FORMAT:
                raise sqlite3.DatabaseError(f"it is of format {found}, and this version reads {_FORMAT}")
            for later, statements in _LATER_FORMATS.items():
                for statement in statements if found < later else ():
                    self._database.execute(statement)
            epoch = max(self._setting("epoch") + 1, int(now_s) - _EPOCHS_BEGIN_S)
            for key, value in (("format", _FORMAT), ("epoch", epoch)):
                self._database.execute("insert or replace into settings values (?, ?)", (key, value))
        return epoch

    def _setting(self, key: str) -> int:
        row = self._database.execute("select value from settings where key = ?", (key,)).fetchone()
        return 0 if row is None else int(row[0])

    def _write(self, change: Callable[[], object]) -> None:
        try:
            with self._transaction():
                self.check_leads()
                change()
        except sqlite3.Error as error:
            raise NotWritten(self._path, error) from error

    @contextmanager
    def _transaction(self) -> Generator[None]:
        self._database.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._database.execute("rollback")
            raise
        self._database.execute("commit")

    @contextmanager
    def _refused(self) -> Generator[None]:
        """Tell an operator which file it is that cannot be used."""
        try:
            yield
        except (sqlite3.Error, msgspec.MsgspecError, ValueError, TypeError, Flaw) as error:
            remedy = f"it is no catalogue that can be used ({error}): give another file, or mend this one"
            raise InvalidConfig("registry_file", str(self._path), remedy) from error


def _row(registered: RegisteredName) -> tuple[Any, ...]:
    entry, ref = registered.entry, registered.entry.ref
    sites, invocation = (msgspec.json.encode(each).decode() for each in (ref.sites, ref.invocation))
    content = (ref.digest, ref.name, ref.rank, sites, ref.nbytes, invocation)
    told = (entry.root, write_companions(entry.companions), entry.effect, entry.pinned)
    targets = msgspec.json.encode(entry.targets).decode()
    return (entry.name, *content, *told, registered.owner, entry.alias_of, entry.max_requests, targets)


def _registered(row: tuple[Any, ...]) -> RegisteredName:
    """Read a row. Raises ValueError, TypeError or Flaw for one that `_row` did not make."""
    (
        name,
        digest,
        content_name,
        rank,
        sites,
        nbytes,
        invocation,
        root,
        companions,
        effect,
        pinned,
        owner,
        alias_of,
        most,
        targets,
    ) = row
    listed = msgspec.json.decode(sites, type=tuple[str, ...])
    invoked = msgspec.json.decode(invocation, type=tuple[int, ...])
    if not (is_name(name) and is_name(content_name) and effect in _EFFECTS):
        raise ValueError(f"the row of {name!r} is damaged")
    ref = AdapterRef(str(digest), content_name, int(rank), listed, int(nbytes), invoked)
    asked = (int(pinned), str(alias_of), int(most), msgspec.json.decode(targets, type=Targets))
    entry = CatalogueEntry(name, ref, str(root), parse_companions(companions), effect, *asked)
    return RegisteredName(entry, str(owner))
