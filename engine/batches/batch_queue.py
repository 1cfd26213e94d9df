"""Answer the batches that clients have made, the oldest first and a few at a time, behind all other requests.

A batch's results are gathered in one file, from which a server that starts anew goes on. When the batch ends, answers
and errors go to two files of the client's.
"""

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.api.base import EngineClient
from engine.api.bodies.body_parser import BodyParser
from engine.api.errors import ApiError, refused
from engine.api.generation import ENDPOINTS
from engine.batches.batch_census import BatchCensus
from engine.batches.batch_lines import NotJsonLines, count_lines
from engine.batches.batch_records import (
    BatchError,
    BatchErrors,
    BatchObject,
    BatchStatus,
    FileObject,
    NewBatch,
    RequestCounts,
)
from engine.batches.batch_run import BatchRun, BatchTerms
from engine.batches.batch_store import BatchStore
from engine.batches.results_file import open_results_file
from engine.errors import EngineStopped, NotInTime, OutputFailed
from engine.metrics.series import MetricSeries
from engine.waiting.task_pool import TaskPool

_PRIORITY = 1  # other requests have 0, and the lower goes first
_AT_ONCE = 4  # of one owner: a tenant whose batches are slow holds up nobody else's
_MOST_HOURS, _MOST_METADATA, _MOST_KEY, _MOST_VALUE = 168, 16, 64, 512
_RETRY_S, _CLOSE_S = 5.0, 5.0
_log = logging.getLogger(__name__)


class _Ended(msgspec.Struct):
    """What tells of a line's result in which file it belongs."""

    error: dict[str, object] | None = None


class BatchQueue:
    """The batches of one server. Used on one event loop."""

    def __init__(self, client: EngineClient, store: BatchStore, pool: TaskPool, in_flight: int) -> None:
        """Use `store` in `pool`, which has one thread; at most `in_flight` lines run at once."""
        self._client, self._store, self._pool = client, store, pool
        self._lines = TaskPool("batch line", 2)
        self._parser = BodyParser(client, self._lines)
        self._slots, self._in_flight = asyncio.Semaphore(in_flight), in_flight
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(_AT_ONCE))
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, BatchRun] = {}
        self._census = BatchCensus()

    def series(self) -> tuple[MetricSeries, ...]:
        """Tell how many batches there are, and what is left of them."""
        return self._census.series(self._counted)

    async def start(self) -> None:
        """Go on with what an earlier server has not finished."""
        for owner, batch in await self._pool.run(self._store.unfinished):
            self._begin(owner, batch)

    async def close(self) -> None:
        """Stop; what is not finished is for the next server."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)
        self._parser.close()
        self._lines.close()

    async def create(self, owner: str, wire: NewBatch) -> BatchObject:
        """Queue a batch. Raises ApiError for one that cannot be."""
        hours = _checked(wire)
        source = await self._pool.run(lambda: self._store.file(owner, wire.input_file_id))
        if source is None or source.purpose != "batch":
            remedy = f"there is no file {wire.input_file_id!r} of purpose 'batch': send one to /v1/files"
            raise refused("input_file_id", remedy, "no_file")
        now_s = int(time.time())
        batch = BatchObject(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=wire.endpoint,
            input_file_id=wire.input_file_id,
            completion_window=wire.completion_window,
            created_at=now_s,
            expires_at=now_s + 3600 * hours,
            metadata=wire.metadata,
        )
        await self._keep(owner, batch)
        self._begin(owner, batch)
        return batch

    async def one(self, owner: str, batch_id: str) -> BatchObject:
        """Return a batch as it is now. Raises ApiError if this owner has none of that id."""
        found = await self._pool.run(lambda: self._store.batch(owner, batch_id))
        if found is None:
            raise ApiError(
                404, f"there is no batch {batch_id!r}: list them at /v1/batches", "batch_id", "no_batch"
            )
        return self._counted(found)

    async def list(self, owner: str) -> list[BatchObject]:
        """List an owner's batches, the newest first."""
        found = await self._pool.run(lambda: self._store.batches(owner))
        return [self._counted(each) for each in found]

    async def cancel(self, owner: str, batch_id: str) -> BatchObject:
        """Answer no more lines of a batch; what is answered is kept. Raises ApiError if it has ended."""
        batch = await self.one(owner, batch_id)
        if batch.status == "cancelling":
            return batch
        if batch.status in ("validating", "in_progress") and (task := self._tasks.get(batch_id)) is not None:
            task.cancel()
            await asyncio.wait((task,))
            batch = await self.one(owner, batch_id)  # it may have ended meanwhile
        if batch.status == "finalizing" and batch_id not in self._tasks:
            self._begin(owner, batch)
        if batch.status not in ("validating", "in_progress"):
            message = f"batch {batch_id} is {batch.status}: only one that is under way can be cancelled"
            raise ApiError(409, message, "batch_id", "batch_ended")
        batch = batch.turned("cancelling", int(time.time()))
        await self._keep(owner, batch)
        self._begin(owner, batch)
        return batch

    def _begin(self, owner: str, batch: BatchObject) -> None:
        self._census.begin(batch)
        task = asyncio.create_task(self._finish_some_time(owner, batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._forget(batch.id, task))

    def _forget(self, batch_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(batch_id) is task:
            del self._tasks[batch_id]

    async def _finish_some_time(self, owner: str, batch: BatchObject) -> None:
        """Work on a batch until it has ended; a disk that does not answer is asked again."""
        while True:
            try:
                async with self._turns[owner]:
                    with self._census.working(batch.id):
                        await self._work(owner, batch)
                return
            except EngineStopped:
                return  # and so does the server: the next one goes on
            except (NotInTime, OutputFailed, OSError) as error:
                _log.warning("batch %s goes on in %g s: %s", batch.id, _RETRY_S, error)
                await asyncio.sleep(_RETRY_S)
            except Exception:  # noqa: BLE001 - a batch's boundary: told in its record
                _log.exception("batch %s failed in a way that nobody foresaw", batch.id)
                await self._fail(owner, batch, "internal_error", "the server failed; its log has the cause")
                return

    async def _work(self, owner: str, batch: BatchObject) -> None:
        if batch.status == "validating":
            validated = await self._validated(owner, batch)
            if validated is None:
                return
            batch = validated
        end: BatchStatus = "cancelled" if batch.status == "cancelling" else "completed"
        if batch.status == "in_progress":
            window = asyncio.timeout(max(0.0, batch.expires_at - time.time()))
            try:
                async with window:
                    await self._answer(owner, batch)
            except TimeoutError:
                if not window.expired():
                    raise  # of the disk
                end = "expired"
            if end == "completed":
                batch = batch.turned("finalizing", int(time.time()))
                await self._keep(owner, batch)
        await self._end(owner, batch, end)

    async def _validated(self, owner: str, batch: BatchObject) -> BatchObject | None:
        """Count the lines, and let the batch begin; None if it has failed as a whole."""
        source = self._store.content_path(batch.input_file_id)
        try:
            total, flaw = await self._pool.run(lambda: count_lines(source)), "it has no lines"
        except NotJsonLines as error:
            total, flaw = 0, str(error)
        if total == 0:
            await self._fail(owner, batch, "invalid_file", f"the input file: {flaw}")
            return None
        begun = msgspec.structs.replace(
            batch.turned("in_progress", int(time.time())), request_counts=RequestCounts(total)
        )
        await self._keep(owner, begun)
        return begun

    async def _fail(self, owner: str, batch: BatchObject, code: str, message: str) -> None:
        told = BatchErrors((BatchError(code=code, message=message, param="input_file_id"),))
        failed = msgspec.structs.replace(batch.turned("failed", int(time.time())), errors=told)
        await self._keep(owner, failed)

    async def _answer(self, owner: str, batch: BatchObject) -> None:
        terms = BatchTerms(self._slots, self._in_flight, batch.endpoint, owner, _PRIORITY, waits=True)
        run = BatchRun(self._client, self._parser, self._lines, terms)
        opened = open_results_file(self._store.results_path(batch.id))
        results = await self._lines.run(opened.__enter__)
        self._running[batch.id] = run
        try:
            await run.run(self._store.content_path(batch.input_file_id), results)
        finally:
            del self._running[batch.id]
            await self._lines.run(lambda: opened.__exit__(None, None, None))

    async def _end(self, owner: str, batch: BatchObject, status: BatchStatus) -> None:
        """Give the client the results, and say that the batch has ended."""
        ended = await self._pool.run(lambda: self._hand_out(owner, batch))
        await self._keep(owner, ended.turned(status, int(time.time())))
        await self._pool.run(lambda: self._store.results_path(batch.id).unlink(missing_ok=True))

    def _hand_out(self, owner: str, batch: BatchObject) -> BatchObject:
        """Make the files of answers and errors of what there is; doing it again changes nothing."""
        source = self._store.results_path(batch.id)
        if not source.exists():
            return batch  # nothing was answered
        ids = {kind: f"file-{batch.id.removeprefix('batch_')}-{kind}" for kind in ("output", "error")}
        paths = {kind: self._store.upload_path(file_id) for kind, file_id in ids.items()}
        counts = _split(source, paths["output"], paths["error"])
        for kind, file_id in ids.items():
            if counts[kind] == 0:
                paths[kind].unlink()
                continue
            record = FileObject(
                id=file_id,
                bytes=paths[kind].stat().st_size,
                created_at=int(time.time()),
                filename=f"{batch.id}_{kind}.jsonl",
                purpose="batch_output",
            )
            self._store.add_file(owner, record)
        return msgspec.structs.replace(
            batch,
            output_file_id=ids["output"] if counts["output"] else None,
            error_file_id=ids["error"] if counts["error"] else None,
            request_counts=RequestCounts(batch.request_counts.total, counts["output"], counts["error"]),
        )

    def _counted(self, batch: BatchObject) -> BatchObject:
        """Return it with the counts of this moment."""
        run = self._running.get(batch.id)
        if run is None:
            return batch
        counts = RequestCounts(batch.request_counts.total, run.summary.completed, run.summary.failed)
        return msgspec.structs.replace(batch, request_counts=counts)

    async def _keep(self, owner: str, batch: BatchObject) -> None:
        await self._pool.run(lambda: self._store.put_batch(owner, batch))
        self._census.turned(batch)


def _checked(wire: NewBatch) -> int:
    """Return in how many hours a batch is to be done. Raises ApiError for what cannot be asked."""
    if wire.endpoint not in ENDPOINTS:
        remedy = f"{wire.endpoint!r} is not supported: give {' or '.join(ENDPOINTS)}"
        raise refused("endpoint", remedy, "unknown_url")
    hours = 0
    with suppress(ValueError):
        hours = int(wire.completion_window.removesuffix("h"))
    if not (wire.completion_window == f"{hours}h" and 1 <= hours <= _MOST_HOURS):
        remedy = f"{wire.completion_window!r} is not supported: give hours from '1h' to '{_MOST_HOURS}h'"
        raise refused("completion_window", remedy, "invalid_value")
    metadata = wire.metadata or {}
    if len(metadata) > _MOST_METADATA or any(
        len(key) > _MOST_KEY or len(value) > _MOST_VALUE for key, value in metadata.items()
    ):
        remedy = f"give at most {_MOST_METADATA} keys of {_MOST_KEY} characters, with values of {_MOST_VALUE}"
        raise refused("metadata", remedy, "invalid_value")
    return hours


def _split(source: Path, output: Path, errors: Path) -> dict[str, int]:
    """Write the lines of `source` that are answers, and those that are errors; return how many of each."""
    counts = {"output": 0, "error": 0}
    with source.open("rb") as lines, output.open("wb") as answered, errors.open("wb") as failed:
        files = {"output": answered, "error": failed}
        for line in lines:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            kind = "output" if msgspec.json.decode(line, type=_Ended).error is None else "error"
            files[kind].write(line)
            counts[kind] += 1
    return counts
