"""Answer the lines of one file into one file of results. Where it ends early, a later run does what is missing.

It may not know who asked for the batch. Files are read and written in a thread, so that a slow disk holds up nothing.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.api.base import EngineClient
from engine.api.bodies.body_parser import read_when_fetched
from engine.api.errors import FORESEEN, ApiError, as_api_error, refused
from engine.api.generation import ENDPOINTS, Endpoint, Generation
from engine.api.parsing import GenerateRequest
from engine.batches.batch_lines import BatchLine, BrokenLine, numbered_lines, read_line
from engine.batches.results_file import RESULT_PREFIX, ResultsFile, key_of, key_of_line
from engine.errors import EngineStopped
from engine.waiting.task_pool import TaskPool
from scheduler.request import Origin

_ERRORS_TOLD = 20
_PASSING = (429, 503)
_LEAST_WAIT_S, _MOST_WAIT_S = 1.0, 30.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Summary:
    """How a run went: lines answered, lines that became errors, lines that were done before, errors among those."""

    answered: int = 0
    errors: int = 0
    skipped: int = 0
    skipped_errors: int = 0

    @property
    def failed(self) -> int:
        """Lines whose result is an error, of this run or an earlier one."""
        return self.errors + self.skipped_errors

    @property
    def completed(self) -> int:
        """Lines that have an answer, of this run or an earlier one."""
        return self.answered + self.skipped - self.skipped_errors

    def __str__(self) -> str:
        total = self.answered + self.errors + self.skipped
        before = (
            f" ({self.skipped_errors} errors: --retry-errors does them again)" if self.skipped_errors else ""
        )
        return f"{total} lines: {self.answered} answered, {self.errors} errors, {self.skipped} done before{before}"


class LineReader(Protocol):
    """What reads the bodies of lines, as bodies over HTTP are read."""

    async def request(self, path: str, body: bytearray, tenant: str = "") -> GenerateRequest:
        """Read what is to be generated. Raises what `engine.api.parsing` raises."""
        ...


class InlineReader:
    """Reads bodies at once: nobody else waits for the event loop."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def request(self, path: str, body: bytearray, tenant: str = "") -> GenerateRequest:
        """Read what is to be generated. Raises what `engine.api.parsing` raises."""

        async def read() -> GenerateRequest:
            return ENDPOINTS[path].read(bytes(body), self._client)

        return await read_when_fetched(self._client, read)


@dataclass(frozen=True, slots=True)
class BatchTerms:
    """How the lines of a batch are asked.

    At most `slots` run at once, of all batches that share them, and `most_lines` of this one run or wait. Every line
    has to ask `url`, if it is given. With `waits`, what is refused for a while is asked again, and holds no slot until
    then: others go on. Else that refusal is the line's result.
    """

    slots: asyncio.Semaphore
    most_lines: int
    url: str | None = None
    tenant: str = ""
    priority: int = 0
    waits: bool = False


@dataclass(frozen=True, slots=True)
class BatchWatcher:
    """Whom a run tells of its progress: `line_done` after each line, `tell` a text for each of the first errors."""

    line_done: Callable[[], object] = field(default=lambda: None)
    tell: Callable[[str], object] = field(default=lambda _: None)


class BatchRun:
    """One run over one input. Use `run` once; `summary` may be read meanwhile."""

    def __init__(
        self,
        client: EngineClient,
        reader: LineReader,
        files: TaskPool,
        terms: BatchTerms,
        watcher: BatchWatcher = BatchWatcher(),
    ) -> None:
        """Read and write files in `files`."""
        self._client, self._reader, self._files = client, reader, files
        self._terms, self._watcher = terms, watcher
        self._seen: set[bytes] = set()
        self._lines = asyncio.Semaphore(terms.most_lines)
        self.summary = Summary()

    async def run(self, source: Path, results: ResultsFile) -> Summary:
        """Answer every line of `source` that `results` lacks.

        Raises EngineStopped, OutputFailed, NotInTime or OSError; the lines in flight are for the next run.
        """
        file = await self._files.run(lambda: source.open("rb"))
        try:
            async with asyncio.TaskGroup() as running:
                await self._begin_all(file, results, running)
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            await self._files.run(file.close)
        return self.summary

    async def _begin_all(self, file: BinaryIO, results: ResultsFile, running: asyncio.TaskGroup) -> None:
        lines = numbered_lines(file)
        while (found := await self._files.run(lambda: _next(lines))) is not None:
            number, raw = found
            accepted = await self._accept(number, raw, results)
            if accepted is None:
                self._watcher.line_done()
                continue
            await self._lines.acquire()
            task = running.create_task(self._answer_line(number, *accepted, results))
            task.add_done_callback(lambda _: self._lines.release())  # also if it is cancelled unbegun

    async def _accept(
        self, number: int, raw: bytes, results: ResultsFile
    ) -> tuple[BatchLine, Endpoint] | None:
        """Return the line's request; None if it is done already, or is none and got its error line."""
        line = read_line(raw)
        if isinstance(line, BrokenLine):
            await self._fail(number, line, results)
            return None
        try:
            key = self._new_key(line)
            endpoint = self._endpoint(line)
        except ApiError as error:
            await self._fail(number, BrokenLine(line.custom_id, error), results)
            return None
        return None if self._is_done(key, results) else (line, endpoint)

    def _new_key(self, line: BatchLine) -> bytes:
        key = key_of(line.custom_id)
        if key in self._seen:
            raise refused(
                "custom_id",
                f"{line.custom_id!r} was given before: give every line its own",
                "duplicate_custom_id",
            )
        self._seen.add(key)
        return key

    def _endpoint(self, line: BatchLine) -> Endpoint:
        endpoint = line.endpoint
        if self._terms.url is not None and line.url != self._terms.url:
            remedy = f"{line.url!r} is not the batch's endpoint: give {self._terms.url!r}"
            raise refused("url", remedy, "mismatched_url")
        return endpoint

    def _is_done(self, key: bytes, results: ResultsFile) -> bool:
        """Tell whether there is a result for `key` already, and count it if so."""
        if key not in results:
            return False
        self.summary.skipped += 1
        self.summary.skipped_errors += results.is_error(key)
        return True

    async def _answer_line(
        self, number: int, line: BatchLine, endpoint: Endpoint, results: ResultsFile
    ) -> None:
        request_id = f"{RESULT_PREFIX}{uuid.uuid4().hex}"
        status, error = 200, None
        try:
            body = await self._answer_in_time(line, endpoint)
        except EngineStopped:
            raise
        except Exception as failure:  # noqa: BLE001 - a line's boundary: told in its result
            if not isinstance(failure, FORESEEN):
                _log.exception("line %r failed unexpectedly", line.custom_id)
            told = as_api_error(failure)
            status, body, error = told.status, told.body(), {"code": told.code, "message": told.message}
        response = {"status_code": status, "request_id": request_id, "body": body}
        result: dict[str, object] = {
            "id": request_id,
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        await self._append(result, results)
        if error is None:
            self.summary.answered += 1
        else:
            self._count_error(number, line.custom_id, str(error["message"]))
        self._watcher.line_done()

    async def _answer_in_time(self, line: BatchLine, endpoint: Endpoint) -> dict[str, object]:
        """Answer a line; wait where it is refused for a while only."""
        while True:
            try:
                async with self._terms.slots:
                    return await self._answer(line, endpoint)
            except EngineStopped:
                raise
            except FORESEEN as error:
                told = as_api_error(error)
                if not (self._terms.waits and told.status in _PASSING):
                    raise
                await asyncio.sleep(min(_MOST_WAIT_S, max(_LEAST_WAIT_S, told.retry_after_s)))

    async def _answer(self, line: BatchLine, endpoint: Endpoint) -> dict[str, object]:
        request = await self._reader.request(line.url, bytearray(line.body), self._terms.tenant)
        if request.form.stream:
            raise refused("stream", "a batch has no streams: leave it out", "unsupported_value")
        origin = Origin(self._terms.tenant, self._terms.priority)
        async with Generation(endpoint, self._client, request, None, origin) as generation:
            return await generation.whole()

    async def _fail(self, number: int, line: BrokenLine, results: ResultsFile) -> None:
        """Write the error line of a line that is no request; its number tells it when the batch is resumed."""
        if self._is_done(key_of_line(number), results):
            return
        error = line.error
        told = {"code": error.code, "message": error.message, "line": number}
        result_id = f"{RESULT_PREFIX}{uuid.uuid4().hex}"
        result: dict[str, object] = {
            "id": result_id,
            "custom_id": line.custom_id,
            "response": None,
            "error": told,
        }
        await self._append(result, results)
        self._count_error(number, line.custom_id, error.message)

    async def _append(self, result: dict[str, object], results: ResultsFile) -> None:
        """Write a result; a run that is stopped meanwhile stops after that, so that no answer is lost."""
        written = asyncio.ensure_future(self._files.run(lambda: results.append(result)))
        try:
            await asyncio.shield(written)
        except asyncio.CancelledError:
            await written
            raise

    def _count_error(self, number: int, custom_id: str | None, message: str) -> None:
        self.summary.errors += 1
        if self.summary.errors <= _ERRORS_TOLD:
            name = "" if custom_id is None else f" ({custom_id!r})"
            self._watcher.tell(f"line {number}{name}: {' '.join(message.split())}")
        if self.summary.errors == _ERRORS_TOLD + 1:
            self._watcher.tell("further errors are told in the results only")


def _next(lines: Iterator[tuple[int, bytes]]) -> tuple[int, bytes] | None:
    return next(lines, None)
