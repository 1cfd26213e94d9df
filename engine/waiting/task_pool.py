"""Await work that blocks, on a few threads of its own purpose, and never beyond a deadline.

The event loop's default pool is used nowhere: one kind of work that hangs would hold up all others.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from engine.errors import NotInTime
from lora.daemon_threads import DaemonExecutor, QueueFull

R = TypeVar("R")
_log = logging.getLogger(__name__)

_MOST_QUEUED = 1 << 14  # more than connections: what else is bounded says how many may come
_RETRY_AFTER_S = 1


class TaskPool:
    """Threads for one purpose. What waits, for a thread or for the work, does so for `timeout_s` at most."""

    def __init__(
        self, purpose: str, threads: int, timeout_s: float = 60.0, most_queued: int = _MOST_QUEUED
    ) -> None:
        self._purpose = purpose
        self._timeout_s = timeout_s
        self._executor = DaemonExecutor(threads, f"pool-{purpose}", most_queued)

    async def run(self, work: Callable[[], R]) -> R:
        """Return or raise what `work` does in a thread. Raises NotInTime if the queue is full, or at the deadline.

        Work that nobody waits for any more is not begun; what has begun keeps its thread until it returns.
        """
        try:
            future = asyncio.wrap_future(self._executor.submit(work))
        except QueueFull:
            raise NotInTime(f"too much {self._purpose} work waits already", _RETRY_AFTER_S) from None
        done, _ = await asyncio.wait((future,), timeout=self._timeout_s)
        if not done:
            future.cancel()
            reason = f"{self._purpose} work was not done within {self._timeout_s:g} s"
            raise NotInTime(reason, _RETRY_AFTER_S)
        return future.result()

    def begin(self, work: Callable[[], object]) -> None:
        """Have work done in a thread that nobody waits for; a pool that is full or closed leaves it undone."""
        with suppress(QueueFull, RuntimeError):
            self._executor.submit(work)

    async def run_or_leave(self, part: str, end: Callable[[], object]) -> None:
        """Wait while `end` ends a part of the process; one that hangs is left to itself."""
        try:
            await self.run(end)
        except NotInTime:
            _log.warning(
                "%s had not ended %g s after being told to: it is left to itself", part, self._timeout_s
            )

    def close(self) -> None:
        """Take no more work; nobody waits for what runs."""
        self._executor.shutdown(wait=False, cancel_futures=True)
