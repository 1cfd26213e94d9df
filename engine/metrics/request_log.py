"""Write what clients did: an audit line for each act of administration and, if wanted, an access line a request.

Lines are ASCII: JSON escapes whatever a client wrote, so that no text of its own ends a line. Files are only appended
to, and opened anew when another program has moved them. They are written in threads of their own; who administers
waits until the audit has been written. It may not know HTTP's requests.
"""

import asyncio
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Protocol

from engine.config.config import AccessLog
from engine.errors import NotInTime
from engine.metrics.log_queue import AUDIT, CLOSE_S, WRITTEN, LogQueue
from engine.metrics.tracing import Attributes, LiveSpan, Tracing

_MOST_CHARS = 200
_AUDIT_S = 5.0  # for audit lines to be written
_RETRY_AFTER_S = 5
_TOLD = ("request_id", "model", "prompt_tokens", "output_tokens", "ttft_s", "client_gone")  # by a span
_log = logging.getLogger(__name__)


class GenerationCounts(Protocol):
    """What a request has generated so far."""

    @property
    def prompt_tokens(self) -> int:
        """Count the tokens of its prompts."""
        ...

    @property
    def output_tokens(self) -> int:
        """Count the tokens that were sampled."""
        ...

    @property
    def first_token_at_s(self) -> float | None:
        """Return when the first one came, on the monotonic clock; None before."""
        ...


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request; handlers add to it as they learn more."""

    request_id: str
    peer: str
    method: str
    path: str
    began_s: float = field(default_factory=time.monotonic)
    key: str = ""  # the name of the client's key
    tenant: str = ""
    sees_all: bool = False  # what is of other tenants too
    status: int = 0
    code: str | None = None  # of the error that was answered
    client_gone: bool = False
    administers: bool = False
    model: str | None = None  # or the adapter that was administered
    counts: GenerationCounts | None = None
    span: LiveSpan | None = None
    rates: Callable[[], Mapping[str, str]] = dict[
        str, str
    ]  # headers that tell what is left of its tenant's limits

    @property
    def trace(self) -> str:
        """Return what spans of this request are below; empty if nobody traces it."""
        return "" if self.span is None else self.span.trace

    def access(self) -> dict[str, object]:
        """Return the fields of an access line."""
        counts, first_s = self.counts, self.counts.first_token_at_s if self.counts else None
        return self._who() | {
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "model": self.model,
            "prompt_tokens": counts.prompt_tokens if counts else None,
            "output_tokens": counts.output_tokens if counts else None,
            "ttft_s": None if first_s is None else round(first_s - self.began_s, 4),
            "duration_s": round(time.monotonic() - self.began_s, 4),
            "client_gone": self.client_gone,
        }

    def audit(self) -> dict[str, object]:
        """Return the fields of an audit line."""
        outcome = "done" if self.status == 200 else self.code or "failed"
        action = {"action": self.path, "adapter": self.model, "status": self.status, "outcome": outcome}
        return self._who() | action

    def _who(self) -> dict[str, object]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return {"time": now, "request_id": self.request_id, "key": self.key or None, "peer": self.peer}


class RequestLog:
    """Writes lines to files, or to this process's log. Without a file the audit goes there at level INFO."""

    def __init__(
        self,
        audit_file: Path | None = None,
        access: AccessLog = "off",
        access_file: Path | None = None,
        audit_s: float = _AUDIT_S,
        tracing: Tracing | None = None,
    ) -> None:
        """Open the files; audit lines have `audit_s` to be written. With `tracing` every request is a span.

        Raises OSError.
        """
        self._tracing = tracing
        self._access_format, self._audit_s = access, audit_s
        audit = _ToLog() if audit_file is None else _LineFile(audit_file, keeps_lines=True)
        self._audit_lines = LogQueue(audit, "audit")
        self._audit = _logger(AUDIT, self._audit_lines)
        self._last = Future[None]()  # of the newest audit line
        self._last.set_result(None)
        self._access_lines: LogQueue | None = None
        self._access = logging.getLogger("engine.access")
        if access_file is not None:
            self._access_lines = LogQueue(_LineFile(access_file), "access")
            self._access = _logger("engine.access", self._access_lines)

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Begin the span of a request, below the one that its headers name."""
        if self._tracing is not None:
            record.span = self._tracing.begin_server(f"{record.method} {record.path[:_MOST_CHARS]}", headers)

    async def wait_for_audit(self) -> None:
        """Wait until all audit lines so far are written. Raises NotInTime."""
        if not await self._is_written():
            reason = f"the audit log was not written within {self._audit_s:g} s, so nothing was changed"
            raise NotInTime(reason, _RETRY_AFTER_S)

    async def write_audit(self, record: RequestRecord) -> None:
        """Write what is to be said of an act of administration, and wait a while until it is written."""
        if not record.administers:
            return
        self._last = Future[None]()
        self._audit.info("%s", _json(record.audit()), extra={WRITTEN: self._last})
        if not await self._is_written():
            _log.error("the audit line of request %s is not written yet", record.request_id)

    def write_access(self, record: RequestRecord) -> None:
        """Write the access line of a request that has ended, if that is wanted, and end its span."""
        if record.span is not None:
            record.span.end(*_span_end(record))
        if self._access_format == "json":
            self._access.info("%s", _json(record.access()))
        elif self._access_format == "text":
            self._access.info("%s", _text(record.access()))

    def lost(self) -> Mapping[str, int]:
        """Count the lines that were left out of each file since nothing wrote them fast enough."""
        access = self._access_lines.lost if self._access_lines else 0
        return {"access": access, "audit": self._audit_lines.lost}

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything is written; False if it is not within `timeout_s`."""
        access = self._access_lines is None or self._access_lines.flush(timeout_s)
        return self._audit_lines.flush(timeout_s) and access

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, for `timeout_s` at most, and close the files; say what was not written."""
        for name, lines in (("audit", self._audit_lines), ("access", self._access_lines)):
            if lines is not None and not lines.close(timeout_s):
                _log.error("the last lines of the %s log were not written: it hangs", name)

    async def _is_written(self) -> bool:
        """Wait for the newest audit line; False if it is not written in time."""
        done, _ = await asyncio.wait((asyncio.wrap_future(self._last),), timeout=self._audit_s)
        return bool(done)


class _LineFile(WatchedFileHandler):
    """A file of lines. One that cannot be written disturbs no request: the process's log says so.

    It says so once; but if the file `keeps_lines`, each line that it does not take goes to the log.
    """

    def __init__(self, path: Path, keeps_lines: bool = False) -> None:
        super().__init__(path, encoding="utf-8")
        self._keeps_lines, self._told = keeps_lines, False

    def createLock(self) -> None:  # noqa: N802 - the library calls it so
        """Make no lock: one thread writes, and nobody may wait for one that hangs."""
        self.lock = None

    def _open(self) -> io.TextIOWrapper:
        """Open the file without a buffer, whose lock a hung write would hold."""
        raw = io.FileIO(self.baseFilename, "a")
        return io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)  # pyright: ignore[reportArgumentType] - a raw file will do

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line, after opening the file anew if it was moved."""
        try:
            super().emit(record)
        except OSError:  # it was moved, and cannot be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library calls it so
        """Say that the file cannot be written."""
        reason = sys.exc_info()[1]
        if self._keeps_lines:
            _log.error(
                "%s cannot be written (%s), so its line is here: %s", self.baseFilename, reason, record.msg
            )
        elif not self._told:
            self._told = True
            _log.error("%s cannot be written (%s): lines are lost", self.baseFilename, reason)


class _ToLog(logging.Handler):
    """Hands lines on to this process's log."""

    def createLock(self) -> None:  # noqa: N802 - the library calls it so
        """Make no lock: one thread writes, and nobody may wait for one that hangs."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Log what a record says, and wait for a place if need be."""
        logging.getLogger(record.name).info("%s", record.msg)


def _logger(name: str, lines: LogQueue) -> logging.Logger:
    """Return a logger of its own that writes to a queue alone."""
    logger = logging.Logger(name, logging.INFO)
    logger.addHandler(lines.entry)
    return logger


def _json(fields: Mapping[str, object]) -> str:
    return json.dumps({name: _short(value) for name, value in fields.items()})


def _text(fields: Mapping[str, object]) -> str:
    return " ".join(f"{name}={json.dumps(_short(value))}" for name, value in fields.items())


def _span_end(record: RequestRecord) -> tuple[Attributes, str | None]:
    """Return what a span says of a request, and the failure, if it is the server's."""
    told = {f"loraserve.{name}": value for name, value in record.access().items() if name in _TOLD}
    attributes = {
        name: value[:_MOST_CHARS] if isinstance(value, str) else value
        for name, value in told.items()
        if isinstance(value, str | int | float)
    }
    failed = record.status >= 500 or record.status == 0
    return {
        "http.response.status_code": record.status
    } | attributes, record.code or "gone" if failed else None


def _short(value: object) -> object:
    return value[:_MOST_CHARS] if isinstance(value, str) else value
