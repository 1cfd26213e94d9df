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
    """At most `most` threads, started when the others are busy. Call it from its event loop only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._busy = 0
        self._threads: list[threading.Thread] = []
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, work: Callable[[], R]) -> asyncio.Future[R]:
        """Run `work` in a thread, to its end, whatever becomes of the future of its result."""
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
            thread = threading.Thread(target=self._work, name="transport-pull", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._queue.put(run)
        return future

    def end(self) -> None:
        """End the threads once all is done; nothing may follow it."""
        for _ in self._threads:
            self._queue.put(None)

    def shutdown(self) -> None:
        """Wait until all is done, and end the threads. It blocks, so any thread may call it; nothing may follow it."""
        self.end()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (run := self._queue.get()) is not None:
            run()

    def _hand_over(self, future: asyncio.Future[R], deliver: Callable[[], None]) -> None:
        self._busy -= 1
        if not future.done():  # it may have been cancelled
            deliver()


def run_apart(work: Callable[[], R]) -> asyncio.Future[R]:
    """Run `work` in a thread of its own, which nobody waits for when the interpreter ends."""
    threads = WorkerThreads(1)
    future = threads.submit(work)
    threads.end()
    return future
