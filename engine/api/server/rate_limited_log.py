"""Log what strangers can cause at will: a port scan must not fill the log."""

import logging
import time
from collections.abc import Callable

_LINES, _PERIOD_S = 10, 60.0
_MOST_CHARS = 300


class RateLimitedLog:
    """Lines of one kind, at most `lines` a period; how many were left out is said with the next one."""

    def __init__(
        self,
        log: logging.Logger,
        level: int = logging.INFO,
        lines: int = _LINES,
        period_s: float = _PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._level = level
        self._lines = lines
        self._period_s = period_s
        self._clock = clock
        self._began_s = clock()
        self._written = 0
        self._left_out = 0

    def line(self, text: str) -> None:
        """Write a line, shortened and with what is not printable escaped, or count it."""
        now_s = self._clock()
        if now_s - self._began_s >= self._period_s:
            self._began_s, self._written = now_s, 0
        if self._written >= self._lines:
            self._left_out += 1
            return
        self._written += 1
        more = f" ({self._left_out} more of these before)" if self._left_out else ""
        self._left_out = 0
        self._log.log(self._level, "%s%s", printable(text), more)


def printable(text: str) -> str:
    """Return the beginning of a text with all but printable ASCII escaped."""
    short = text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."
    return "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in short)
