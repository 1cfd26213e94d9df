"""Write log lines in a thread of their own: a disk or a reader that hangs holds up nobody who logs.

The queue is bounded. A line that finds it full is left out and counted. One of the audit waits instead: its caller is
a thread that does nothing else. Handlers have no lock here, since one thread uses each, and the interpreter's end
would wait for a lock that a hung one holds.
"""

import io
import logging
import os
import queue
import threading
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener

_MOST_LINES = 10_000
CLOSE_S = 2.0  # for what is queued to be written at the end
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_log = logging.getLogger(__name__)

AUDIT = "engine.audit"
"""The logger of audit lines; what it sends is never left out for want of a place."""

WRITTEN = "written"
"""The attribute of a record that holds a Future, resolved once the record has been written, or given up."""


class LogQueue:
    """A bounded queue of records before a handler that may hang, and the thread that empties it."""

    def __init__(
        self, handler: logging.Handler, name: str | None = None, most_lines: int = _MOST_LINES
    ) -> None:
        """Begin no thread yet.

        What was left out of a log with a `name` is told in the process's log. That has none, and tells of itself.
        """
        self._queue = queue.Queue[logging.LogRecord | None](most_lines)
        self._lock = threading.Lock()  # guards the fields below
        self._lost = 0
        self._is_started = False
        self._handler = handler
        self._writer = _Writer(self._queue, handler, name, self)
        self.entry: logging.Handler = _Entry(self._queue, self)

    @property
    def lost(self) -> int:
        """Count the lines that were left out because the queue was full."""
        return self._lost

    def lose(self) -> None:
        """Count one more."""
        with self._lock:
            self._lost += 1

    def start(self) -> None:
        """Begin the thread, if it was not begun yet."""
        with self._lock:
            if not self._is_started:
                self._is_started = True
                self._writer.start()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything is written; False if it is not within `timeout_s`."""
        done = self._queue.all_tasks_done
        with done:
            return done.wait_for(lambda: not self._queue.unfinished_tasks, timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Flush, and end the thread; one that hangs is left to itself, and False is returned."""
        if not self.flush(timeout_s):
            return False
        with self._lock:
            if self._is_started:
                self._is_started = False
                self._writer.stop()
        self._handler.close()
        return True


class _Entry(QueueHandler):
    """Puts records into a queue, on the thread of whoever logs."""

    def __init__(self, lines: queue.Queue[logging.LogRecord | None], owner: LogQueue) -> None:
        super().__init__(lines)
        self._lines, self._owner = lines, owner

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it as lost; a record of the audit waits for a place."""
        self._owner.start()
        try:
            self._lines.put(record, block=record.name == AUDIT and not hasattr(record, WRITTEN))
        except queue.Full:
            self._owner.lose()
            _resolve(record)


class _Writer(QueueListener):
    """Takes records out of a queue, on a thread of its own."""

    def __init__(
        self,
        lines: queue.Queue[logging.LogRecord | None],
        handler: logging.Handler,
        name: str | None,
        owner: LogQueue,
    ) -> None:
        super().__init__(lines, handler)
        self._name, self._owner, self._told = name, owner, 0

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record; before it, how many have been left out since the last one."""
        lost = self._owner.lost
        if lost > self._told:
            log = f"the {self._name} log" if self._name else "this log"
            told = f"{lost - self._told} lines of {log} were left out: it was not written fast enough"
            self._told = lost
            if self._name is None:
                super().handle(logging.LogRecord(__name__, logging.WARNING, __file__, 0, told, None, None))
            else:
                _log.warning("%s", told)
        super().handle(record)
        _resolve(record)


def _resolve(record: logging.LogRecord) -> None:
    written = getattr(record, WRITTEN, None)
    if isinstance(written, Future):
        with suppress(InvalidStateError):  # nobody waits for it any more
            written.set_result(None)


class _ErrorStream(logging.StreamHandler[io.TextIOWrapper]):
    """Standard error, by a descriptor of its own and without a buffer: at its end the interpreter locks sys.stderr."""

    def __init__(self) -> None:
        raw = io.FileIO(os.dup(2), "w")
        super().__init__(io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True))  # pyright: ignore[reportArgumentType] - a raw file will do
        self.setFormatter(logging.Formatter(_FORMAT))

    def createLock(self) -> None:  # noqa: N802 - the library calls it so
        """Make no lock."""
        self.lock = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library calls it so
        """Say nothing: there is nowhere to say it."""

    def close(self) -> None:
        """Close the descriptor too."""
        super().close()
        with suppress(OSError):
            self.stream.close()


@contextmanager
def server_log(level: str) -> Generator[LogQueue]:
    """Send this process's log to standard error through a queue, until the context ends."""
    root = logging.getLogger()
    before = root.level
    try:
        lines = LogQueue(_ErrorStream())
    except OSError:  # there is no standard error
        lines = LogQueue(logging.NullHandler())
    root.addHandler(lines.entry)
    root.setLevel(level.upper())
    try:
        yield lines
    finally:
        root.removeHandler(lines.entry)
        root.setLevel(before)
        lines.close()
