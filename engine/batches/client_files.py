"""Take, list, hand out and delete the files of clients, without holding up the event loop."""

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path

from engine.api.errors import ApiError, refused
from engine.batches.batch_records import FileObject
from engine.batches.batch_store import BatchStore
from engine.config.batches_config import BatchesConfig
from engine.waiting.task_pool import TaskPool


class ClientFiles:
    """The files that clients keep here, each seen only by its owner."""

    def __init__(self, store: BatchStore, pool: TaskPool, config: BatchesConfig) -> None:
        """Use `store` in `pool`, which has one thread."""
        self._store, self._pool, self._config = store, pool, config
        self._uploads: set[Upload] = set()

    async def _used_bytes(self) -> int:
        """Count the bytes of all files, those that come included."""
        kept = await self._pool.run(self._store.used_bytes)
        return kept + sum(upload.nbytes for upload in self._uploads)

    @asynccontextmanager
    async def upload(self) -> AsyncGenerator["Upload"]:
        """Begin to take a file; what is not kept when the context ends is deleted."""
        file_id = f"file-{uuid.uuid4().hex}"
        path = self._store.upload_path(file_id)
        file = await self._pool.run(lambda: path.open("wb", buffering=0))
        upload = Upload(file_id, file, self._pool, self._config, self._used_bytes)
        self._uploads.add(upload)
        try:
            yield upload
        finally:
            self._uploads.discard(upload)
            await self._pool.run(lambda: _end(file, path))

    async def keep(self, upload: "Upload", owner: str, filename: str) -> FileObject:
        """Register what has come as the owner's file of requests."""
        record = FileObject(
            id=upload.file_id,
            bytes=upload.nbytes,
            created_at=int(time.time()),
            filename=filename,
            purpose="batch",
        )
        await self._pool.run(lambda: self._store.add_file(owner, record))
        self._uploads.discard(upload)
        return record

    async def list(self, owner: str, purpose: str | None, oldest_first: bool) -> list[FileObject]:
        """List an owner's files, of one purpose if it is given."""
        return await self._pool.run(lambda: self._store.files(owner, purpose, oldest_first))

    async def one(self, owner: str, file_id: str) -> FileObject:
        """Return a file. Raises ApiError if this owner has none of that id."""
        found = await self._pool.run(lambda: self._store.file(owner, file_id))
        if found is None:
            raise ApiError(404, f"there is no file {file_id!r}: list them at /v1/files", "file_id", "no_file")
        return found

    async def content(self, owner: str, file_id: str) -> Path:
        """Return where a file's content is. Raises ApiError as `one`."""
        return self._store.content_path((await self.one(owner, file_id)).id)

    async def remove(self, owner: str, file_id: str) -> None:
        """Delete a file. Raises ApiError as `one`, or if a batch still reads it."""
        await self.one(owner, file_id)
        unfinished = await self._pool.run(self._store.unfinished)
        for _, batch in unfinished:
            if batch.input_file_id == file_id:
                message = f"batch {batch.id} still reads {file_id}: cancel it first, or wait"
                raise ApiError(409, message, "file_id", "file_in_use")
        await self._pool.run(lambda: self._store.remove_file(file_id))


class Upload:
    """A file that comes. Not more of it is written than there may be."""

    def __init__(
        self,
        file_id: str,
        file: FileIO,
        pool: TaskPool,
        config: BatchesConfig,
        used_bytes: Callable[[], Awaitable[int]],
    ) -> None:
        """Write to `file`; `used_bytes` counts all files, this one included."""
        self.file_id, self.nbytes = file_id, 0
        self._file, self._pool, self._config, self._used_bytes = file, pool, config, used_bytes

    async def write(self, piece: bytearray) -> None:
        """Write the next piece. Raises ApiError if the file or all files together become too large."""
        self.nbytes += len(piece)
        if self.nbytes > self._config.batch_file_bytes:
            most = self._config.batch_file_bytes
            message = f"the file is over {most} bytes (--batch-file-bytes): send it in parts"
            raise ApiError(413, message, "file", "file_too_large")
        if await self._used_bytes() > self._config.batch_dir_bytes:
            message = (
                f"all files together would be over {self._config.batch_dir_bytes} bytes (--batch-dir-bytes): "
                "delete some first"
            )
            raise ApiError(413, message, "file", "files_full")
        await self._pool.run(lambda: _write_all(self._file, piece))


def check_filename(name: str | None) -> str:
    """Return a name that a client may give a file: it is shown, and names nothing on disk."""
    if not name or len(name) > 255 or not name.isprintable():
        raise refused("file", "give the part a filename of at most 255 printable characters", "invalid_value")
    return name


def _end(file: FileIO, path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)


def _write_all(file: FileIO, piece: bytearray) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) or 0 :]
