"""Run what blocks in threads, for one event loop. The standard pool takes twice as long to hand work over."""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

R = TypeVar("R")


class WorkerThreads:
    """At most `most` threads, begun when the others are busy. Call it from its event loop only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._busy = 0
        self._threads: list[threading.Thread] = []
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def do(self, work: Callable[[], R]) -> asyncio.Future[R]:
        """Do `work` in a thread, to its end, whatever becomes of the future, which has what it returns or raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def run() -> None:
            try:
                deliver = partial(future.set_result, work())
            except BaseException as error:  # noqa: BLE001  (whoever waits for the future gets it)
                deliver = partial(future.set_exception, error)
            with suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(self._hand_over, future, deliver)

        self._busy += 1
        if len(self._threads) < min(self._busy, self._most):
            thread = threading.Thread(target=self._toil, name="transport-pull", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._waiting.put(run)
        return future

    def dismiss(self) -> None:
        """Wait until all is done, and end the threads. It blocks, so any thread may call it; nothing may follow it."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _toil(self) -> None:
        while (run := self._waiting.get()) is not None:
            run()

    def _hand_over(self, future: asyncio.Future[R], deliver: Callable[[], None]) -> None:
        self._busy -= 1
        if not future.done():  # it may have been cancelled
            deliver()
