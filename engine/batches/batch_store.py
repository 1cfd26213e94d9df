"""Keep clients' files and batches in a folder, so that a server that was killed goes on where it ended.

What is registered is in an SQLite file in WAL mode; a file's content is whole before it is registered. One server at a
time may use a folder. All calls block: they belong in a thread, one at a time.
"""

import fcntl
import os
import sqlite3
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import msgspec

from engine.batches.batch_records import UNFINISHED, BatchObject, FileObject
from engine.errors import InvalidConfig

_SCHEMA = """
create table if not exists files (at integer primary key, id text unique not null, owner text not null,
    bytes integer not null, record blob not null);
create table if not exists batches (at integer primary key, id text unique not null, owner text not null,
    status text not null, record blob not null);
"""
_PUT_FILE = "insert into files (id, owner, bytes, record) values (?, ?, ?, ?) on conflict (id) do nothing"
_PUT_BATCH = (
    "insert into batches (id, owner, status, record) values (?, ?, ?, ?) "
    "on conflict (id) do update set status = excluded.status, record = excluded.record"
)
_FOLDERS = ("contents", "uploads", "results")


class BatchStore:
    """The files and batches of one folder, each with its owner: the name of the key that it was made by."""

    def __init__(self, folder: Path) -> None:
        """Open or begin the store at `folder`. Raises InvalidConfig if it cannot be used."""
        self._folder = folder
        try:
            for name in _FOLDERS:
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
            self._database = sqlite3.connect(
                folder / "batches.sqlite", isolation_level=None, check_same_thread=False
            )
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = full")
            self._database.executescript(_SCHEMA)
            self._sweep()
        except (OSError, sqlite3.Error) as error:
            raise InvalidConfig("batch_dir", str(folder), f"it cannot be used: {error}") from error

    def _sweep(self) -> None:
        """Delete what a process left that was killed: files that nothing names."""
        unfinished = {self.results_path(batch.id).name for _, batch in self.unfinished()}
        known = {name for (name,) in self._database.execute("select id from files")}
        for folder, kept in (("uploads", set[str]()), ("results", unfinished), ("contents", known)):
            for each in (self._folder / folder).iterdir():
                if each.name not in kept:
                    each.unlink()

    def close(self) -> None:
        """Let another server use the folder."""
        self._database.close()
        self._lock.close()

    def upload_path(self, file_id: str) -> Path:
        """Return where a file is written while it comes."""
        return self._folder / "uploads" / file_id

    def results_path(self, batch_id: str) -> Path:
        """Return where a batch's results are gathered."""
        return self._folder / "results" / f"{batch_id}.jsonl"

    def content_path(self, file_id: str) -> Path:
        """Return where the content of a registered file is."""
        return self._folder / "contents" / file_id

    def used_bytes(self) -> int:
        """Count the bytes of all files."""
        ((total,),) = self._database.execute("select coalesce(sum(bytes), 0) from files")
        return total

    def add_file(self, owner: str, record: FileObject) -> None:
        """Register what was written at `upload_path`. One that is registered already stays as it is."""
        source, content = self.upload_path(record.id), self.content_path(record.id)
        if source.exists():
            with source.open("rb") as file:
                os.fsync(file.fileno())
            source.replace(content)
        row = (record.id, owner, record.bytes, msgspec.json.encode(record))
        self._database.execute(_PUT_FILE, row)

    def file(self, owner: str, file_id: str) -> FileObject | None:
        """Return a file; None if this owner has none of that id."""
        found = self._database.execute(
            "select record from files where id = ? and owner = ?", (file_id, owner)
        ).fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=FileObject)

    def files(self, owner: str, purpose: str | None, oldest_first: bool) -> list[FileObject]:
        """List an owner's files."""
        order = "asc" if oldest_first else "desc"
        rows = self._database.execute(
            f"select record from files where owner = ? order by at {order}", (owner,)
        )
        found = [msgspec.json.decode(record, type=FileObject) for (record,) in rows]
        return [each for each in found if purpose is None or each.purpose == purpose]

    def remove_file(self, file_id: str) -> None:
        """Forget a file and delete its content."""
        self._database.execute("delete from files where id = ?", (file_id,))
        self.content_path(file_id).unlink(missing_ok=True)

    def put_batch(self, owner: str, record: BatchObject) -> None:
        """Keep a batch as it is now."""
        row = (record.id, owner, record.status, msgspec.json.encode(record))
        self._database.execute(_PUT_BATCH, row)

    def batch(self, owner: str, batch_id: str) -> BatchObject | None:
        """Return a batch; None if this owner has none of that id."""
        found = self._database.execute(
            "select record from batches where id = ? and owner = ?", (batch_id, owner)
        ).fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=BatchObject)

    def batches(self, owner: str) -> list[BatchObject]:
        """List an owner's batches, the newest first."""
        rows = self._database.execute("select record from batches where owner = ? order by at desc", (owner,))
        return [msgspec.json.decode(record, type=BatchObject) for (record,) in rows]

    def unfinished(self) -> Sequence[tuple[str, BatchObject]]:
        """List the batches that are to be gone on with, each with its owner, the oldest first."""
        marks = ", ".join("?" * len(UNFINISHED))
        rows = self._database.execute(
            f"select owner, record from batches where status in ({marks}) order by at", tuple(UNFINISHED)
        )
        return [(owner, msgspec.json.decode(record, type=BatchObject)) for owner, record in rows]


def _locked(folder: Path) -> FileIO:
    file = (folder / "lock").open("wb", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = "another server uses it: give each a folder of its own"
        raise InvalidConfig("batch_dir", str(folder), remedy) from None
    except OSError:
        pass  # a file system without locks
    return file
