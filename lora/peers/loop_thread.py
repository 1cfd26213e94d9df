"""Run a transport's event loop in a thread of its own, for callers that may wait."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from transport.errors import TransportClosed

R = TypeVar("R")


class LoopThread:
    """Runs coroutines for other threads, until closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()  # held from "it is open" to "this is begun"
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="peer-loop", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, R]) -> R:
        """Run `work`, and return or raise what it does; TransportClosed if the loop was closed before that."""
        with self._lock:
            if self._closed:
                work.close()
                raise TransportClosed("this node shares no adapters any more: it is shutting down")
            begun = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return begun.result()
        except CancelledError as error:
            raise TransportClosed("this node is shutting down: ask another") from error

    def close(self) -> None:
        """Cancel what runs and end the thread; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            end = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        end.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
