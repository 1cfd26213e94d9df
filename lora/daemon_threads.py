"""Run what may block in daemon threads: bounded pools, and calls that end by a deadline.

The standard pool's queue has no bound, and the interpreter waits for its threads before it ends. A call that hangs
keeps its thread for ever. Here a hung file system costs what waits for it, and nothing else.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_CLOSE_S = 5.0  # how long `shutdown` waits for jobs under way
_MOST_HUNG = 64  # calls at once: each has a thread


class QueueFull(RuntimeError):
    """A pool's queue is full: what it is asked for may be asked for again later."""


class CallHangs(RuntimeError):
    """A call has not returned within its time, and may never: `what` it concerns is asked for again later."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} {reason}: check its disk or network folder, and try again")
        self.what = what


@dataclass(frozen=True, slots=True)
class _Call:
    future: Future[Any]
    work: Callable[[], Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.work()
        except BaseException as error:  # noqa: BLE001 - whoever holds the future gets it
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class DaemonExecutor(Executor):
    """At most `threads` daemon threads, started when needed; `most_queued` jobs wait for one, None for no bound."""

    def __init__(self, threads: int, name: str, most_queued: int | None = None) -> None:
        self._most_threads = threads
        self._name = name
        self._most_queued = most_queued
        self._lock = threading.Lock()  # guards the fields below, and nothing is called under it
        self._open = 0  # jobs that have not ended
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a job as soon as a thread is free. Raises QueueFull; RuntimeError after `shutdown`."""
        future: Future[R] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the pool {self._name} is closed")
            if self._most_queued is not None and self._open >= self._most_threads + self._most_queued:
                raise QueueFull(f"{self._open} jobs of the pool {self._name} are open already: try again")
            self._open += 1
            if len(self._threads) < min(self._open, self._most_threads):
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._jobs.put(_Call(future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs. What is queued still runs unless cancelled; waiting for it has an end."""
        with self._lock:
            self._closed = True
            threads = tuple(self._threads)
        if cancel_futures:
            self._cancel_queued()
        for _ in threads:
            self._jobs.put(None)
        until = time.monotonic() + _CLOSE_S
        for thread in threads if wait else ():
            thread.join(max(0.0, until - time.monotonic()))

    def _cancel_queued(self) -> None:
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                job.future.cancel()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            with self._lock:
                self._open -= 1
            del job  # an idle thread keeps no job's result alive


class DeadlineCalls:
    """Calls that may hang for ever, each in a thread of its own; callers wait for `timeout_s` at most.

    A thread that hangs is left to itself. What it concerns is not called for again until it has returned.
    """

    def __init__(self, timeout_s: float = 60.0, most: int = _MOST_HUNG) -> None:
        self._timeout_s = timeout_s
        self._most = most
        self._lock = threading.Lock()  # guards the fields below
        self._running = 0
        self._hung: set[str] = set()

    def run(self, what: str, call: Callable[[], R]) -> R:
        """Return or raise what `call` does. Raises CallHangs if it does neither in time, as the last one did."""
        future: Future[R] = Future()
        with self._lock:
            if what in self._hung:
                raise CallHangs(what, "still does not answer an earlier call")
            if self._running >= self._most:
                raise CallHangs(what, f"has to wait: {self._running} files are being read or hang")
            self._running += 1
        threading.Thread(
            target=self._call, args=(what, _Call(future, call)), name="file", daemon=True
        ).start()
        wait((future,), self._timeout_s)
        with self._lock:
            if not future.done():
                self._hung.add(what)
                raise CallHangs(what, f"has not answered within {self._timeout_s:g} s")
        return future.result()

    def _call(self, what: str, job: _Call) -> None:
        job.run()
        with self._lock:
            self._running -= 1
            self._hung.discard(what)
