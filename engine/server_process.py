"""A server as a process: the signals that end it, and what it says when it is ready and when it fails."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from engine.metrics.log_queue import CLOSE_S
from lora.daemon_threads import CallHangs, DeadlineCalls

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_S = 0.05
_log = logging.getLogger(__name__)


def stopped_by_signals() -> asyncio.Event:
    """Return an event that the first signal sets; the second signal finds the system's default and kills."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def begin() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in _SIGNALS:
        loop.add_signal_handler(number, begin)
    return stop


def freeze_objects() -> None:
    """Have garbage collection skip all that lives now: it would hold every thread half a second, and find nothing."""
    gc.collect()
    gc.freeze()


async def run_until(stop: asyncio.Event, tell: Callable[[], None], trouble: Callable[[], str | None]) -> None:
    """Wait for `stop`, and meanwhile call `tell` once there is no `trouble`; till then the log says what it is.

    Raises what `tell` raises: whoever waits to be told would wait in vain.
    """
    if (found := trouble()) is not None:
        _log.warning("not ready yet: %s", found)
    while trouble() is not None and not stop.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await stop.wait()
    if not stop.is_set():
        tell()
    await stop.wait()


def tell_ready(text: str) -> None:
    """Write the lines that tell where clients may connect to standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


def tell_end(error: Exception) -> None:
    """Say on standard error what ends the server; nothing waits long for one that nobody reads."""
    with suppress(CallHangs):
        line = f"python -m engine.serve: {error}\n"
        DeadlineCalls(CLOSE_S).run("standard error", lambda: sys.stderr.write(line))
