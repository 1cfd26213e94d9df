"""EngineCore: the step loop of one node. Decide, pin, compute, commit; no text, no sockets, no asyncio.

Any thread may submit, abort or finish: the lock guards decisions, which take microseconds, and is free while
a step computes. One thread at a time calls `step`.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.errors import AdapterFailed, EngineError, StepFailed
from engine.executor import StepOutputs
from lora.adapter import AdapterRef
from lora.store import AdapterStore, Lease
from scheduler.blocks import BlockStats
from scheduler.plan import FinishReason, SequenceKey, StepPlan, TokenEvent
from scheduler.request import Request
from scheduler.step import Live, StepScheduler

_PREFETCH_DEPTH = 8
_UNSOUND = StepFailed(
    "the model's logits were NaN or infinite: check the weights of the adapter and the base"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """A live request that the engine gave up on, and why; nothing more will come of it."""

    request_id: str
    error: EngineError


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought. `idle` is true when nothing could run: wait for a submission or an adapter."""

    events: tuple[TokenEvent, ...]
    failures: tuple[Failure, ...]
    idle: bool


class StepExecutor(Protocol):
    """Computes steps: one process on one device, or a group of them."""

    def run(self, plan: StepPlan, lease: Lease) -> StepOutputs:
        """The plan's outputs; `lease` holds the plan's adapters. What it raises ends the plan's requests."""
        ...


class EngineCore:
    """Runs requests to their end, many at a time, each under its own adapter."""

    def __init__(
        self,
        scheduler: StepScheduler,
        store: AdapterStore,
        executor: StepExecutor,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._store = store
        self._executor = executor
        self._clock = clock
        self._lock = threading.Lock()
        self._adapters: dict[str, AdapterRef] = {}  # request id -> the content it retains
        self.steps = 0

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRefused if it can never run, UnknownAdapter if its adapter is gone."""
        with self._lock:
            self._store.retain(request.adapter)
            try:
                self._scheduler.add(request)
            except ValueError:
                self._store.release(request.adapter)
                raise
            self._adapters[request.request_id] = request.adapter
        if not request.adapter.is_base:
            self._store.prefetch((request.adapter,))

    def abort(self, request_id: str) -> None:
        """End all of a request's sequences without another event; unknown ids are fine."""
        with self._lock:
            self._scheduler.abort(request_id)
            self._release((request_id,))

    def finish(self, key: SequenceKey) -> None:
        """End one sequence because its text is complete (a stop string was met)."""
        with self._lock:
            self._scheduler.finish(key, FinishReason.STOP)
            self._release((key.request_id,))

    @property
    def num_live_requests(self) -> int:
        """Requests with a sequence that has not ended."""
        return len(self._adapters)

    def live(self) -> Live:
        """Sequences that run and that wait."""
        with self._lock:
            return self._scheduler.live()

    def block_stats(self) -> BlockStats:
        """K/V blocks in use, cached and free, and what the prefix cache supplied."""
        with self._lock:
            return self._scheduler.block_stats()

    def step(self) -> StepResult:
        """Run one step. Never waits for an adapter: sequences whose adapter is on its way sit the step out."""
        with self._lock:
            failures = self._fail_unloadable()
            plan = self._scheduler.plan(self._clock(), self._store.ready())
            wanted = self._scheduler.wanted(_PREFETCH_DEPTH)
        if wanted:
            self._store.prefetch(wanted)
        if not plan.slices:
            return StepResult((), failures, idle=not failures)
        try:
            computed = self._compute(plan)
        except Exception as error:  # noqa: BLE001 - whatever a step raises ends its own requests, never the server
            _log.exception("a step of %d sequences failed", len(plan.slices))
            return StepResult((), failures + self._fail_plan(plan, error), idle=False)
        with self._lock:
            failures += self._end([key.request_id for key in computed.broken], _UNSOUND)
            events = self._scheduler.commit(plan, computed.outputs)
            self._release(event.key.request_id for event in events if event.finish_reason)
        self.steps += 1
        return StepResult(events, failures, idle=False)

    def _compute(self, plan: StepPlan) -> StepOutputs:
        with self._store.acquire(plan.adapters) as lease:
            return self._executor.run(plan, lease)

    def _fail_plan(self, plan: StepPlan, error: Exception) -> tuple[Failure, ...]:
        told = StepFailed(f"the step failed ({type(error).__name__}); the server's log has the cause")
        with self._lock:
            return self._end([part.key.request_id for part in plan.slices], told)

    def _fail_unloadable(self) -> tuple[Failure, ...]:
        failed = self._store.failed()
        if not failed:
            return ()
        failures: list[Failure] = []
        for digest, cause in failed.items():
            ids = [name for name, ref in self._adapters.items() if ref.digest == digest]
            failures += self._end(ids, AdapterFailed(str(cause)))
        return tuple(failures)

    def _end(self, request_ids: Iterable[str], error: EngineError) -> tuple[Failure, ...]:
        distinct = tuple(dict.fromkeys(request_ids))
        for request_id in distinct:
            self._scheduler.abort(request_id)
        self._release(distinct)
        return tuple(Failure(request_id, error) for request_id in distinct)

    def _release(self, request_ids: Iterable[str]) -> None:
        """Let go of the adapters of those of the requests that have no live sequence left."""
        for request_id in request_ids:
            if request_id in self._adapters and not self._scheduler.is_live(request_id):
                self._store.release(self._adapters.pop(request_id))
