"""Write what clients did: an audit line for each act of administration and, if wanted, an access line a request.

Lines are ASCII: JSON escapes whatever a client wrote, so that no text of its own ends a line. Files are only appended
to, and opened anew when another program has moved them. It may not know HTTP's requests.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Protocol

from engine.config.config import AccessLog

_MOST_CHARS = 200


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
    status: int = 0
    code: str | None = None  # of the error that was answered
    client_gone: bool = False
    administers: bool = False
    model: str | None = None  # or the adapter that was administered
    counts: GenerationCounts | None = None

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
        self, audit_file: Path | None = None, access: AccessLog = "off", access_file: Path | None = None
    ) -> None:
        """Open the files. Raises OSError."""
        self._access_format = access
        self._audit = _logger("engine.audit", audit_file)
        self._access = _logger("engine.access", access_file)

    def write(self, record: RequestRecord) -> None:
        """Write what is to be said of a request that has ended."""
        if record.administers:
            self._audit.info("%s", _json(record.audit()))
        if self._access_format == "json":
            self._access.info("%s", _json(record.access()))
        elif self._access_format == "text":
            self._access.info("%s", _text(record.access()))

    def close(self) -> None:
        """Close the files."""
        for handler in (*self._audit.handlers, *self._access.handlers):
            handler.close()


class _LineFile(WatchedFileHandler):
    """A file of lines. One that cannot be written disturbs no request: standard error says so, once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line, after opening the file anew if it was moved."""
        try:
            super().emit(record)
        except OSError:  # it was moved, and cannot be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library calls it so
        """Say that the file cannot be written."""
        if not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}): lines are lost\n")


def _logger(name: str, file: Path | None) -> logging.Logger:
    """Return this process's logger of a name, or one of its own that writes to a file alone."""
    if file is None:
        return logging.getLogger(name)
    logger = logging.Logger(name, logging.INFO)
    logger.addHandler(_LineFile(file))
    return logger


def _json(fields: Mapping[str, object]) -> str:
    return json.dumps({name: _short(value) for name, value in fields.items()})


def _text(fields: Mapping[str, object]) -> str:
    return " ".join(f"{name}={json.dumps(_short(value))}" for name, value in fields.items())


def _short(value: object) -> object:
    return value[:_MOST_CHARS] if isinstance(value, str) else value
