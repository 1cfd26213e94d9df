"""Run an engine's steps in a thread of their own, and tell whoever submitted a request what comes of it.

Everything but the steps runs on the event loop. The two meet in EngineCore, which its lock guards, and in
`call_soon_threadsafe`.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.core import EngineCore
from engine.errors import EngineError, EngineStopped
from engine.live.request_spans import RequestSpans
from engine.step_result import StepResult
from engine.waiting.task_pool import TaskPool
from lora.store.loader import AdapterLoader
from scheduler.plan import SequenceKey, TokenEvent
from scheduler.request import Request

_IDLE_POLL_S = 0.5
_log = logging.getLogger(__name__)


class StepListener(Protocol):
    """Whoever submits requests, and is told on the event loop what comes of them."""

    def hear(self, events: Sequence[TokenEvent]) -> None:
        """Take in all events of one step for this listener's requests, in order."""
        ...

    def fail(self, request_id: str, error: EngineError) -> None:
        """Note that the engine gave a request up: nothing more comes of it."""
        ...


@dataclass(slots=True)
class _Submitted:
    """A live request: who is told of it, and which of its sequences have not ended."""

    listener: StepListener
    open: set[int] = field(default_factory=set[int])


class StepLoop:
    """The thread that steps, and who waits for which request. Its methods are called on the event loop."""

    def __init__(self, core: EngineCore, loader: AdapterLoader, spans: RequestSpans | None = None) -> None:
        """Step `core`, also whenever `loader` has brought an adapter; `spans` are told of every request."""
        self.failure: EngineStopped | None = None  # what ended the thread, if not `close`
        self._core, self._loader, self._spans = core, loader, spans or RequestSpans()
        self._requests: dict[str, _Submitted] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._on_failure: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def core(self) -> EngineCore:
        """The engine's core, of which any thread may ask what it tells."""
        return self._core

    @property
    def trouble(self) -> str | None:
        """Why no steps are taken; None while they are."""
        if self._thread.is_alive() and self.failure is None:
            return None
        return str(self.failure or "the engine does not run")

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call `callback`, on the event loop, when an error has ended the thread."""
        self._on_failure.append(callback)

    def start(self) -> None:
        """Begin to step; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._loader.on_ready(self._wake.set)
        self._thread.start()

    def submit(self, request: Request, listener: StepListener) -> None:
        """Queue a request; its events go to `listener` from the next turn of the event loop on.

        Raises what EngineCore.submit raises. Call `wake` once all that belongs together is queued.
        """
        self._spans.begin(request)
        try:
            self._core.submit(request)
        except BaseException:
            self._spans.ended(request.request_id, "refused")
            raise
        self._requests[request.request_id] = _Submitted(listener, set(range(request.params.n)))

    def wake(self) -> None:
        """Have the thread look for something to do."""
        self._wake.set()

    def finish(self, key: SequenceKey) -> None:
        """End one sequence because its text is complete: no event follows."""
        self._core.finish(key)
        self._spans.finished(key.request_id, key.index)
        self._end(key)

    def abort(self, request_id: str) -> None:
        """End all sequences of a request: no event follows. Unknown ids are fine, and so is a core that failed."""
        self._requests.pop(request_id, None)
        self._spans.ended(request_id, "abort")
        if self.failure is None:
            self._core.abort(request_id)

    async def close(self, pool: TaskPool) -> None:
        """Stop after the current step; `pool` waits for it."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            await pool.run_or_leave("the step under way", self._thread.join)
        if self.failure is None:
            await pool.run_or_leave("the step under way", self._core.wait_for_step)

    def _run(self) -> None:
        assert self._loop is not None, "start() sets the loop before the thread"
        self._core.driving.acquire()  # for good: when this loop has ended, nothing steps any more
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                result = self._core.step()
            except Exception as error:  # noqa: BLE001 - whatever escapes must not leave requests waiting
                _log.critical("the step loop has ended by an error", exc_info=error)
                failure = error if isinstance(error, EngineStopped) else EngineStopped(error)
                self.failure = failure
                self._loop.call_soon_threadsafe(self._fail, failure)
                return
            if result.events or result.failures:
                self._loop.call_soon_threadsafe(self._deliver, result)
            if result.idle:
                self._wake.wait(_IDLE_POLL_S)

    def _fail(self, failure: EngineStopped) -> None:
        """End what runs, now that nothing will come of it, and tell whoever watches."""
        requests, self._requests = self._requests, {}
        for request_id, submitted in requests.items():
            self._spans.ended(request_id, "stopped")
            submitted.listener.fail(request_id, failure)
        for callback in self._on_failure:
            callback()

    def _deliver(self, result: StepResult) -> None:
        self._spans.heard(result.events)
        heard: dict[int, tuple[StepListener, list[TokenEvent]]] = {}
        for event in result.events:
            submitted = self._requests.get(event.key.request_id)
            if submitted is None or event.key.index not in submitted.open:
                continue
            listener = submitted.listener
            heard.setdefault(id(listener), (listener, []))[1].append(event)
            if event.finish_reason is not None:
                self._end(event.key)
        for listener, events in heard.values():
            listener.hear(events)
        for failure in result.failures:
            self._spans.ended(failure.request_id, "failed")
            if (submitted := self._requests.pop(failure.request_id, None)) is not None:
                submitted.listener.fail(failure.request_id, failure.error)

    def _end(self, key: SequenceKey) -> None:
        submitted = self._requests.get(key.request_id)
        if submitted is not None:
            submitted.open.discard(key.index)
            if not submitted.open:
                del self._requests[key.request_id]
