"""Answer a file of OpenAI batch requests into a file of results: python -m engine.batch.

Every line is a request of its own, under its own adapter; bad lines become error lines. Whatever stops the
run, the next one goes on where it ended. Only the lines in flight are in memory, and a digest of each name.
Exit codes: 0 every line has an answer, 1 the run failed, 2 an option or a file cannot be used, 3 some lines have
errors, 130 interrupted.
"""

import asyncio
import logging
import os
import signal
import stat
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from engine.api.base import EngineClient
from engine.api.errors import FORESEEN, ApiError, as_api_error, refused
from engine.api.generation import Endpoint, Generation
from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.batch_lines import BatchLine, BrokenLine, count_lines, numbered_lines, read_line
from engine.config.command_line import batch_config
from engine.config.config import BatchConfig
from engine.errors import EngineStopped, InvalidConfig, OutputFailed, WorkersFailed
from engine.metrics.telemetry import Telemetry
from engine.results_file import RESULT_PREFIX, ResultsFile, key_of, key_of_line, open_results_file
from lora.errors import AdapterRefused
from model.checkpoint_files import CheckpointError
from model.config import UnsupportedModel

FAILURE, USAGE_ERROR, LINES_FAILED, INTERRUPTED = 1, 2, 3, 130
_UNBOUNDED_WAITING = 2**31  # `in_flight` is the bound
_ERRORS_TOLD = 20
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

    def __str__(self) -> str:
        total = self.answered + self.errors + self.skipped
        before = (
            f" ({self.skipped_errors} errors: --retry-errors does them again)" if self.skipped_errors else ""
        )
        return f"{total} lines: {self.answered} answered, {self.errors} errors, {self.skipped} done before{before}"


class BatchRun:
    """One run over one input. Use `run` once."""

    def __init__(
        self,
        client: EngineClient,
        config: BatchConfig,
        results: ResultsFile,
        progress: Callable[[], object],
        tell: Callable[[str], object],
    ) -> None:
        """Call `progress` after each line, and `tell` with a line of text for each of the first errors."""
        self._client = client
        self._config = config
        self._results = results
        self._progress = progress
        self._tell = tell
        self._seen: set[bytes] = set()
        self._slots = asyncio.Semaphore(config.in_flight)
        self.summary = Summary()

    async def run(self) -> Summary:
        """Answer every line that the results file lacks.

        Raises EngineStopped or OutputFailed; the lines in flight are for the next run.
        """
        with self._config.input.open("rb") as file:
            try:
                async with asyncio.TaskGroup() as running:
                    for number, raw in numbered_lines(file):
                        accepted = self._accept(number, raw)
                        if accepted is None:
                            self._progress()
                            continue
                        await self._slots.acquire()
                        running.create_task(self._answer_line(number, *accepted))
            except ExceptionGroup as group:
                raise group.exceptions[0] from group
        return self.summary

    def _accept(self, number: int, raw: bytes) -> tuple[BatchLine, Endpoint] | None:
        """Return the line's request; None if it is done already, or is none and got its error line."""
        line = read_line(raw)
        if isinstance(line, BrokenLine):
            self._fail(number, line)
            return None
        try:
            key = self._new_key(line)
            endpoint = line.endpoint
        except ApiError as error:
            self._fail(number, BrokenLine(line.custom_id, error))
            return None
        return None if self._is_done(key) else (line, endpoint)

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

    def _is_done(self, key: bytes) -> bool:
        """Tell whether the results file has a result for `key`, and count it if so."""
        if key not in self._results:
            return False
        self.summary.skipped += 1
        self.summary.skipped_errors += self._results.is_error(key)
        return True

    async def _answer_line(self, number: int, line: BatchLine, endpoint: Endpoint) -> None:
        request_id = f"{RESULT_PREFIX}{uuid.uuid4().hex}"
        status, error = 200, None
        try:
            body = await self._answer(line, endpoint)
        except EngineStopped:
            raise
        except Exception as failure:  # noqa: BLE001 - a line's boundary: told in its result
            if not isinstance(failure, FORESEEN):
                _log.exception("line %r failed unexpectedly", line.custom_id)
            told = as_api_error(failure)
            status, body, error = told.status, told.body(), {"code": told.code, "message": told.message}
            self._count_error(number, line.custom_id, told)
        response = {"status_code": status, "request_id": request_id, "body": body}
        self._results.append(
            {"id": request_id, "custom_id": line.custom_id, "response": response, "error": error}
        )
        self.summary.answered += error is None
        self._progress()
        self._slots.release()

    async def _answer(self, line: BatchLine, endpoint: Endpoint) -> dict[str, object]:
        request = endpoint.read(bytes(line.body), self._client)
        if request.form.stream:
            raise refused("stream", "a batch has no streams: leave it out", "unsupported_value")
        async with Generation(endpoint, self._client, request) as generation:
            return await generation.whole()

    def _fail(self, number: int, line: BrokenLine) -> None:
        """Write the error line of a line that is no request; its number tells it when the batch is resumed."""
        if self._is_done(key_of_line(number)):
            return
        error = line.error
        self._count_error(number, line.custom_id, error)
        told = {"code": error.code, "message": error.message, "line": number}
        result_id = f"{RESULT_PREFIX}{uuid.uuid4().hex}"
        self._results.append({"id": result_id, "custom_id": line.custom_id, "response": None, "error": told})

    def _count_error(self, number: int, custom_id: str | None, error: ApiError) -> None:
        self.summary.errors += 1
        if self.summary.errors <= _ERRORS_TOLD:
            name = "" if custom_id is None else f" ({custom_id!r})"
            self._tell(f"line {number}{name}: {' '.join(error.message.split())}")
        if self.summary.errors == _ERRORS_TOLD + 1:
            self._tell("further errors are told in the results only")


def check_files(config: BatchConfig) -> None:
    """Raise InvalidConfig if a file cannot be used, as far as that shows without touching any."""
    source, sink = config.input, config.output
    if not source.is_file():
        reason = "it is no regular file" if source.exists() else "there is no such file"
        raise InvalidConfig("input", str(source), f"{reason}: give one with -i")
    if not os.access(source, os.R_OK):
        raise InvalidConfig("input", str(source), "it cannot be read: give a file that you may read")
    if reason := _unwritable(config):
        raise InvalidConfig("output", str(sink), f"it cannot be written: {reason}")
    if sink.exists() and source.samefile(sink):
        raise InvalidConfig("output", str(sink), "it is the input: give another file")


def _unwritable(config: BatchConfig) -> str:
    """Return why the output cannot be written and the remedy; empty if nothing speaks against it."""
    sink, folder = config.output, config.output.parent
    if sink.is_dir():
        return "it is a folder, give a file in it"
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r}, make it first"
    if sink.exists() and not stat.S_ISREG(sink.stat().st_mode):
        return "it is no regular file, give one, so that a later run can go on"
    try:
        if sink.exists():
            sink.open("ab").close()
    except OSError as error:
        return f"{error.strerror}, give another file"
    return "" if os.access(folder, os.W_OK) else f"the folder {str(folder)!r} is read-only, give another"


async def run_batch(client: EngineClient, config: BatchConfig) -> Summary:
    """Answer `config.input` into `config.output`.

    Raises InvalidConfig if a file cannot be used, OutputFailed if the output cannot be written any more.
    """
    check_files(config)
    bar = tqdm(
        total=count_lines(config.input), unit="line", disable=not config.engine.progress, file=sys.stderr
    )

    def tell(text: str) -> None:
        bar.write(text, file=sys.stderr)

    with bar, open_results_file(config.output, config.retry_errors) as results:
        return await BatchRun(client, config, results, bar.update, tell).run()


async def _run(node: AsyncEngine, config: BatchConfig) -> Summary:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, os.kill, os.getpid(), signal.SIGINT)
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
    except (InvalidConfig, CheckpointError, UnsupportedModel, AdapterRefused) as error:
        return _ended(USAGE_ERROR, str(error))
    except (EngineStopped, OutputFailed, WorkersFailed) as error:
        return _ended(FAILURE, str(error))
    except OSError as error:
        return _ended(FAILURE, f"{error}: mend that, and run the same command again to go on")
    except KeyboardInterrupt:
        return _ended(INTERRUPTED, "interrupted: run the same command again to go on")
    _say(f"{summary}, results in {config.output}")
    return LINES_FAILED if summary.failed else 0


def _say(text: str) -> None:
    """Print the summary; if nobody can read it any more, the exit code still tells."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered is flushed at exit


def _ended(code: int, message: str) -> int:
    sys.stderr.write(f"python -m engine.batch: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
