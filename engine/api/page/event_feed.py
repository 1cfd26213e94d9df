"""Tell everybody who watches what changed, at one pace for all, and compute nothing while nobody does.

Each who watches has a bounded queue. One that is full belongs to a client that does not keep up: it is hung up on, and
may begin anew. Used on one event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

from engine.api.errors import ApiError
from engine.api.page.table_changes import TableChanges, Tables
from engine.errors import EngineError

PERIOD_S = 1.0
_REST = 4  # times as long as collecting took: so it takes a fifth of the time at most
_MOST_EVENTS = 8
_RETRY_AFTER_S = 5
_log = logging.getLogger(__name__)


class Watcher:
    """One client's events, in order; iterating ends when the feed ends or drops it."""

    def __init__(self, on_drop: Callable[[], object]) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_EVENTS + 1)  # one place for the end
        self._on_drop = on_drop
        self.told_whole = self.ended = False

    def tell(self, event: bytes) -> bool:
        """Queue an event; return False, and hang up, if there is no room for it."""
        if self._queue.qsize() >= _MOST_EVENTS:
            self.end()
            self._on_drop()
            return False
        self._queue.put_nowait(event)
        return True

    def end(self) -> None:
        """Tell nothing more after what is queued."""
        if not self.ended:
            self.ended = True
            self._queue.put_nowait(None)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield each event."""
        while (event := await self._queue.get()) is not None:
            yield event


class EventFeed:
    """The watchers, and the task that collects for them while there are any."""

    def __init__(
        self,
        collect: Callable[[], Awaitable[Tables]],
        most_watchers: int,
        beside: Mapping[str, object] | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        """Tell what `collect` returns every `period_s`; `beside` is what the first event says as well."""
        self._collect, self._most, self._beside = collect, most_watchers, beside
        self._period_s = period_s
        self._watchers: dict[int, Watcher] = {}
        self._changes = TableChanges(beside)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._watchers)

    @asynccontextmanager
    async def watch(self, on_drop: Callable[[], object] = lambda: None) -> AsyncGenerator[Watcher]:
        """Let one more watch; `on_drop` is to hang up on its client. Raises ApiError where that is too many."""
        if self._closed:
            raise _busy("the server ends")
        if len(self._watchers) >= self._most:
            raise _busy(f"{self._most} clients watch already (--page-watchers)")
        watcher = Watcher(on_drop)
        self._watchers[id(watcher)] = watcher
        if self._changes.number:
            watcher.told_whole = watcher.tell(self._changes.whole())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield watcher
        finally:
            self._watchers.pop(id(watcher), None)
            if not self._watchers:
                await self._stop()

    async def close(self) -> None:
        """End all streams, and let nobody watch any more."""
        self._closed = True
        for watcher in self._watchers.values():
            watcher.end()
        await self._stop()

    async def _stop(self) -> None:
        """Collect no more, and keep nothing."""
        task, self._task = self._task, None
        self._changes = TableChanges(self._beside)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                began_s = time.monotonic()
                try:
                    self._tell(await self._collect())
                except EngineError as error:
                    _log.debug("there is nothing new to tell: %s", error)
                await asyncio.sleep(max(self._period_s, _REST * (time.monotonic() - began_s)))
        except Exception:
            _log.exception("the page's events have ended in a way that nobody foresaw")
            for watcher in self._watchers.values():
                watcher.end()
            raise

    def _tell(self, tables: Tables) -> None:
        """Queue what changed, or everything for those that know nothing yet."""
        change = self._changes.advance(tables)
        for key, watcher in tuple(self._watchers.items()):
            event = change if watcher.told_whole else self._changes.whole()
            watcher.told_whole = True
            if watcher.ended or (event is not None and not watcher.tell(event)):
                self._watchers.pop(key, None)


def _busy(reason: str) -> ApiError:
    message = f"{reason}: retry in {_RETRY_AFTER_S} s"
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, None, "busy", retry_after_s=_RETRY_AFTER_S)
