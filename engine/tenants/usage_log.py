"""Write what tenants use to a file every few seconds, in a thread of its own, so that a slow disk holds up nothing.

A process that is killed loses what it counted in the last PERIOD_S seconds, and while a write lasted. A file that
cannot be written loses nothing: what was counted is written later.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from engine.errors import NotInTime
from engine.tenants.usage_counts import UsageCount, UsageCounts, UsageKey
from engine.tenants.usage_file import UsageFile, UsageQuery
from engine.waiting.task_pool import TaskPool

PERIOD_S = 2.0
_WAIT_S = 8.0  # for the disk, twice when the process ends
_RETRY_AFTER_S = 5
_log = logging.getLogger(__name__)


class UsageLog:
    """The counts of a server and the file that keeps them, for so many days. Used on one event loop."""

    def __init__(self, counts: UsageCounts, file: UsageFile, days: int) -> None:
        self._counts, self._file, self._days = counts, file, days
        self._pool = TaskPool("usage", 1, _WAIT_S)
        self._forgotten_on = ""  # the day on which old rows were deleted last
        self._fails = False
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        counts.is_kept = True

    @classmethod
    def open(cls, counts: UsageCounts, path: Path | None, days: int) -> "UsageLog | None":
        """Open the file that keeps `counts`, if one is named. Raises InvalidConfig."""
        return None if path is None else cls(counts, UsageFile(path), days)

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Write the rest and close the file. Doing it again changes nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._task is not None:
            await self._task
        self._counts.is_kept = False
        await self._pool.run_or_leave("the file of usage", self._close)
        self._pool.close()

    async def read(self, query: UsageQuery) -> list[tuple[UsageKey, UsageCount]]:
        """Return what was used, until now. Raises NotInTime if the file cannot be read."""

        def read() -> list[tuple[UsageKey, UsageCount]]:
            self._write()
            return self._file.read(query)

        try:
            return await self._pool.run(read)
        except sqlite3.Error as error:
            raise NotInTime(f"the file of usage cannot be read ({error})", _RETRY_AFTER_S) from error

    async def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):
                    await self._stop.wait()
            try:
                await self._pool.run(self._write)
            except NotInTime as error:
                _log.warning("what tenants use is not written yet: %s", error)

    def _close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        """Write what was counted. The thread takes it, and puts it back on a failure: nothing is counted twice."""
        taken: Mapping[UsageKey, UsageCount] = self._counts.take()
        try:
            if taken:
                self._file.add(taken)
                taken = {}
            today = self._counts.today()
            if today != self._forgotten_on:
                self._file.forget_before(self._counts.today(self._days - 1))
                self._forgotten_on = today
        except sqlite3.Error as error:
            self._counts.put_back(taken)
            if not self._fails:
                _log.error("the file of usage cannot be written (%s): it is tried again", error)
            self._fails = True
            return
        self._fails = False
