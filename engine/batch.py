"""Answer a file of OpenAI batch requests into a file of results: python -m engine.batch.

Every line is a request of its own, under its own adapter; bad lines become error lines. Whatever stops the
run, the next one goes on where it ended. Only the lines in flight are in memory, and a digest of each name.
"""

import asyncio
import logging
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
from tqdm import tqdm

from engine.api.base import EngineClient
from engine.api.errors import FORESEEN, ApiError, as_api_error, refused
from engine.api.generation import ENDPOINTS, Endpoint, Generation
from engine.api.schema import decoded
from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.config.command_line import batch_config
from engine.config.config import BatchConfig
from engine.errors import EngineStopped, InvalidConfig, WorkersFailed
from engine.results_file import RESULT_PREFIX, ResultsFile, key_of, key_of_line, open_results_file
from engine.telemetry import Telemetry
from lora.errors import AdapterRefused
from model.checkpoint import CheckpointError
from model.config import UnsupportedModel

MAX_LINE_BYTES = 16 << 20
USAGE_ERROR, INTERRUPTED = 2, 130
_UNBOUNDED_WAITING = 2**31  # `in_flight` is the bound
_log = logging.getLogger(__name__)


class _Line(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass(slots=True)
class Summary:
    """How a run went: lines answered, lines that became errors, lines that were done before."""

    answered: int = 0
    errors: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        total = self.answered + self.errors + self.skipped
        return f"{total} lines: {self.answered} answered, {self.errors} errors, {self.skipped} done before"


class BatchRun:
    """One run over one input. Use `run` once."""

    def __init__(
        self, client: EngineClient, config: BatchConfig, results: ResultsFile, progress: Callable[[], object]
    ) -> None:
        self._client = client
        self._config = config
        self._results = results
        self._progress = progress
        self._seen: set[bytes] = set()
        self._slots = asyncio.Semaphore(config.in_flight)
        self.summary = Summary()

    async def run(self) -> Summary:
        """Answer every line that the results file lacks. Raises EngineStopped; its lines are for the next run."""
        with self._config.input.open("rb") as file:
            try:
                async with asyncio.TaskGroup() as running:
                    for number, raw in _lines(file):
                        accepted = self._accept(number, raw)
                        if accepted is None:
                            self._progress()
                            continue
                        await self._slots.acquire()
                        running.create_task(self._answer_line(*accepted))
            except ExceptionGroup as group:
                raise group.exceptions[0] from group
        return self.summary

    def _accept(self, number: int, raw: bytes) -> tuple[_Line, Endpoint] | None:
        """Return the line's request; None if it is done already, or is none and got its error line."""
        line: _Line | None = None
        try:
            line = _parsed(raw)
            endpoint = self._endpoint(line)
        except ApiError as error:
            self._fail(number, line.custom_id if line else None, error)
            return None
        if key_of(line.custom_id) in self._results:
            self.summary.skipped += 1
            return None
        return line, endpoint

    def _endpoint(self, line: _Line) -> Endpoint:
        key = key_of(line.custom_id)
        if key in self._seen:
            raise refused("custom_id", f"{line.custom_id!r} was given before", "duplicate_custom_id")
        self._seen.add(key)
        if line.method != "POST" or line.url not in ENDPOINTS:
            remedy = f"{line.method} {line.url} is none of POST {', '.join(ENDPOINTS)}"
            raise refused("url", remedy, "unknown_url")
        return ENDPOINTS[line.url]

    async def _answer_line(self, line: _Line, endpoint: Endpoint) -> None:
        request_id = f"{RESULT_PREFIX}{uuid.uuid4().hex}"
        status, error = 200, None
        try:
            body = await self._answer(line, endpoint)
            self.summary.answered += 1
        except EngineStopped:
            raise
        except Exception as failure:  # noqa: BLE001 - a line's boundary: told in its result
            if not isinstance(failure, FORESEEN):
                _log.exception("line %r failed unexpectedly", line.custom_id)
            told = as_api_error(failure)
            status, body, error = told.status, told.body(), {"code": told.code, "message": told.message}
            self.summary.errors += 1
        response = {"status_code": status, "request_id": request_id, "body": body}
        self._results.append(
            {"id": request_id, "custom_id": line.custom_id, "response": response, "error": error}
        )
        self._progress()
        self._slots.release()

    async def _answer(self, line: _Line, endpoint: Endpoint) -> dict[str, object]:
        request = endpoint.read(bytes(line.body), self._client)
        if request.form.stream:
            raise refused("stream", "a batch has no streams: leave it out", "unsupported_value")
        async with Generation(endpoint, self._client, request) as generation:
            return await generation.whole()

    def _fail(self, number: int, custom_id: str | None, error: ApiError) -> None:
        """Write the error line of a line that is no request; its number tells it when the batch is resumed."""
        if key_of_line(number) in self._results:
            self.summary.skipped += 1
            return
        self.summary.errors += 1
        told = {"code": error.code, "message": error.message, "line": number}
        record = {
            "id": f"{RESULT_PREFIX}{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": None,
            "error": told,
        }
        self._results.append(record)


def _parsed(raw: bytes) -> _Line:
    if len(raw) > MAX_LINE_BYTES:
        raise ApiError(413, f"the line is over {MAX_LINE_BYTES} bytes", None, "line_too_long")
    line = decoded(raw, _Line, "the line")
    if not line.custom_id:
        raise refused("custom_id", "give a text that is not empty", "invalid_value")
    return line


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the text of all lines that are not blank; of one that is too long its beginning."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        if line.strip():
            yield number, line


def _count_lines(path: Path) -> int:
    """Count the lines that are not blank, for the progress bar."""
    with path.open("rb") as file:
        return sum(1 for _ in _lines(file))


def check_files(config: BatchConfig) -> None:
    """Raise InvalidConfig if a file cannot be used, as far as that shows without touching any."""
    if not config.input.is_file():
        raise InvalidConfig("input", str(config.input), "there is no such file: give one with -i")
    if config.output.is_dir():
        raise InvalidConfig(
            "output", str(config.output), "it cannot be written: it is a folder, give a file in it"
        )
    if not config.output.parent.is_dir():
        remedy = f"it cannot be written: there is no folder {str(config.output.parent)!r}, make it first"
        raise InvalidConfig("output", str(config.output), remedy)
    if config.output.exists() and config.input.samefile(config.output):
        raise InvalidConfig("output", str(config.output), "it is the input: give another file")


async def run_batch(client: EngineClient, config: BatchConfig) -> Summary:
    """Answer `config.input` into `config.output`. Raises InvalidConfig if a file cannot be used."""
    check_files(config)
    bar = tqdm(
        total=_count_lines(config.input), unit="line", disable=not config.engine.progress, file=sys.stderr
    )
    with open_results_file(config.output) as results, bar:
        return await BatchRun(client, config, results, bar.update).run()


async def _run(node: AsyncEngine, config: BatchConfig) -> Summary:
    await node.start()
    try:
        return await run_batch(node, config)
    finally:
        await node.close()


def main(arguments: Sequence[str]) -> int:
    """Run a batch and return the process's exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = batch_config(arguments)
        check_files(config)  # before the model is loaded, which takes long
        node = AsyncEngine(assemble(config.engine), Telemetry(), _UNBOUNDED_WAITING)
        summary = asyncio.run(_run(node, config))
    except (
        InvalidConfig,
        CheckpointError,
        UnsupportedModel,
        AdapterRefused,
        EngineStopped,
        WorkersFailed,
    ) as error:
        sys.stderr.write(f"python -m engine.batch: {error}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to go on\n")
        return INTERRUPTED
    sys.stdout.write(f"{summary}, results in {config.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
