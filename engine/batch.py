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
from collections.abc import Sequence

from tqdm import tqdm

from engine.api.base import EngineClient
from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.batches.batch_lines import NotJsonLines, count_lines
from engine.batches.batch_run import BatchRun, BatchTerms, BatchWatcher, InlineReader, Summary
from engine.batches.results_file import open_results_file
from engine.config.command_line import batch_config
from engine.config.config import BatchConfig
from engine.errors import EngineStopped, InvalidConfig, NotInTime, OutputFailed, WorkersFailed
from engine.metrics.telemetry import Telemetry
from engine.waiting.task_pool import TaskPool
from lora.errors import AdapterRefused
from model.checkpoint_files import CheckpointError
from model.config import UnsupportedModel

FAILURE, USAGE_ERROR, LINES_FAILED, INTERRUPTED = 1, 2, 3, 130
_UNBOUNDED_WAITING = 2**31  # `in_flight` is the bound


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
    try:
        total = count_lines(config.input)
    except NotJsonLines as error:
        raise InvalidConfig("input", str(config.input), str(error)) from None
    bar = tqdm(total=total, unit="line", disable=not config.engine.progress, file=sys.stderr)

    def tell(text: str) -> None:
        bar.write(text, file=sys.stderr)

    files, terms = (
        TaskPool("batch file", 1),
        BatchTerms(asyncio.Semaphore(config.in_flight), config.in_flight),
    )
    watcher = BatchWatcher(bar.update, tell)
    try:
        with bar, open_results_file(config.output, config.retry_errors) as results:
            run = BatchRun(client, InlineReader(client), files, terms, watcher)
            return await run.run(config.input, results)
    finally:
        files.close()


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
    except (EngineStopped, NotInTime, OutputFailed, WorkersFailed) as error:
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
