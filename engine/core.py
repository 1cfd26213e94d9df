"""Run the step loop of one engine: decide, pin adapters, compute, commit. Knows no text and no event loop.

Any thread may submit, abort or finish: the lock guards decisions, which take microseconds, and is free while
a step computes. One thread at a time calls `step`, and holds `driving` for it.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Set
from concurrent.futures import Future
from dataclasses import dataclass

from engine.errors import AdapterFailed, EngineError, NotInTime
from engine.runner.base import Computation, DeviceLost, StepExecutor, StepOutputs
from engine.runner.fault_isolation import FailedComputation, StepRetry
from engine.runner.step_costs import StepCosts
from engine.runner.step_history import StepHistory
from engine.step_result import NOTHING, Failure, Probes, StepResult
from engine.unused_adapters import UnusedAdapters
from lora.adapter import AdapterRef
from lora.segments import AdapterLease
from lora.store.store import AdapterStore
from scheduler.blocks import BlockStats
from scheduler.limits import MOST_ROWS
from scheduler.plan import Live, SequenceKey, StepPlan, TokenEvent
from scheduler.request import LogprobsMode, Request
from scheduler.step import StepScheduler
from scheduler.unified_pool import UnifiedPool

_PREFETCH_DEPTH = 8
_LATE = NotInTime("the request's first token could not be drawn in time", 1)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Launch:
    """A plan that is being computed, and the adapters it runs on."""

    plan: StepPlan
    lease: AdapterLease
    computation: Computation
    launched_s: float


class EngineCore:
    """Runs requests to their end, many at a time, each under its own adapter."""

    def __init__(
        self,
        scheduler: StepScheduler,
        store: AdapterStore,
        executor: StepExecutor,
        clock: Callable[[], float],
        vocab_size: int,
        memory: UnifiedPool | None = None,
    ) -> None:
        """Run what `scheduler` plans on a model of `vocab_size` tokens.

        `memory` is what the scheduler shares with `store`, if they share any.
        """
        self._scheduler, self._store, self._executor = scheduler, store, executor
        self._clock, self._vocab_size, self._memory = clock, vocab_size, memory
        self._lock = threading.Lock()
        self._adapters: dict[str, AdapterRef] = {}  # of each request, by its id, the adapter that it retains
        self._probes, self._unused = Probes(), UnusedAdapters()
        self.watch: Callable[[StepPlan, float], None] | None = None  # is told of every step, and what it took
        self.costs: StepCosts | None = None  # what is told of steps, and bounds their rows; set before any
        self.logprobs_mode: LogprobsMode = "raw_logprobs"  # of requests that ask for none; set before any
        self._collected_s = 0.0  # when the last step was done
        self._launched: _Launch | None = None  # the one step whose outputs are still to come
        self.steps = 0  # that were committed
        self.history = StepHistory()
        self.driving = threading.Lock()  # held by whoever calls `step`, for as long as it awaits events

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises InvalidParameter for token ids that the model does not have, RequestRefused if it can never run,
        UnknownAdapter if its adapter is gone.
        """
        request = request.within(self._vocab_size).told_by(self.logprobs_mode)
        with self._lock:
            self._store.retain(request.adapter)
            try:
                self._scheduler.add(request)
            except ValueError:
                self._store.release(request.adapter)
                raise
            self._adapters[request.request_id] = request.adapter
        if self._unused.acts(request):
            self._store.loader.prefetch((request.adapter,))

    def probe(self, request: Request) -> Future[TokenEvent]:
        """Queue a request of the engine's own for one token, which goes to the future alone, or else its failure does.

        Nothing goes there once the request is aborted. Raises as `submit`.
        """
        assert request.params.n == request.params.max_tokens == 1, "a probe is told of one event"
        outcome = self._probes.open(request.request_id)
        try:
            self.submit(request)
        except BaseException:
            self._probes.close(request.request_id)
            raise
        self._store.loader.notify()
        return outcome

    def abort(self, request_id: str) -> None:
        """End all of a request's sequences without another event; unknown ids are fine."""
        with self._lock:
            self._probes.close(request_id)
            self._scheduler.abort(request_id)
            self._release((request_id,))

    def finish(self, key: SequenceKey) -> None:
        """End one sequence because its text is complete (a stop string was met)."""
        with self._lock:
            self._scheduler.finish(key)
            self._release((key.request_id,))

    @property
    def num_live_requests(self) -> int:
        """Requests with a sequence that has not ended."""
        return len(self._adapters)

    def live(self) -> Live:
        """Count the sequences that run and that wait."""
        with self._lock:
            return self._scheduler.live()

    def block_stats(self) -> BlockStats:
        """Count K/V blocks in use, cached and free, and what the prefix cache supplied."""
        with self._lock:
            return self._scheduler.block_stats()

    def step(self) -> StepResult:
        """Plan and launch a step, then collect the one before it: a device computes while the host decides.

        A step that is computed already is collected at once. Never waits for an adapter: sequences whose adapter
        is on its way are left out. Raises DeviceLost or EngineStopped: then nothing can be computed any more.
        """
        first = self._collect(self._take_launched()) if self._must_collect() else NOTHING
        with self._lock:
            failures = self._fail_unloadable() + self._fail_late()
            self._move_boundary()
            leaving = self._make_way()
            rows = MOST_ROWS if self.costs is None else self.costs.rows
            plan = self._scheduler.plan(self._clock(), self._store.ready(), leaving, rows)
            wanted = self._scheduler.wanted(_PREFETCH_DEPTH)
        if wanted:
            self._store.loader.prefetch(wanted)
        before = self._take_launched()
        if plan.slices:
            self._launch(plan)
        then = self._collect(before)
        last = self._collect(self._take_launched()) if self._must_collect() else NOTHING
        return StepResult(
            events=first.events + then.events + last.events,
            failures=first.failures + failures + then.failures + last.failures,
            idle=not (plan.slices or before or first.events or failures),
        )

    def wait_for_step(self) -> None:
        """Wait for the step that is being computed, if any; to be called when no other will follow."""
        self._collect(self._take_launched())

    def _must_collect(self) -> bool:
        """Return whether the launched step is computed, or holds up sequences of the next one."""
        launched = self._launched
        if launched is None:
            return False
        return launched.computation.done or self._scheduler.waits_for_tokens() or self._boundary_must_move()

    def _boundary_must_move(self) -> bool:
        if self._memory is None:
            return False
        with self._lock:
            return self._memory.must_move(self._scheduler.short_blocks())

    def _move_boundary(self) -> None:
        """Move the boundary between K/V and adapters, if it must and no step could write beyond it."""
        if self._memory is None or self._launched is not None:
            return
        if self._memory.must_move(short := self._scheduler.short_blocks()):
            self._memory.move(short)

    def _make_way(self) -> frozenset[str]:
        """Have adapters leave for one that has waited too long, if there is one; return their digests."""
        overdue = self._scheduler.overdue()
        if overdue is None:
            return self._store.make_way(None, frozenset())
        return self._store.make_way(overdue.adapter, overdue.running)

    def _take_launched(self) -> _Launch | None:
        launched, self._launched = self._launched, None
        return launched

    def _launch(self, plan: StepPlan) -> None:
        """Launch a plan. What that raises comes when its outputs are collected, after the step before."""
        lease, launched_s = self._store.acquire(plan.adapters), self._clock()
        try:
            computation = self._executor.launch(plan, lease)
        except DeviceLost:  # every later step would fail as this one did
            lease.release()
            raise
        except Exception as error:  # noqa: BLE001 - whatever else a step raises ends its own requests, never the server
            computation = FailedComputation(error)
        self._launched = _Launch(plan, lease, computation, launched_s)

    def _collect(self, launched: _Launch | None) -> StepResult:
        """Wait for a launched step's outputs, and commit them. One that failed is computed again in parts."""
        if launched is None:
            return NOTHING
        with launched.lease:
            try:
                plan, computed = launched.plan, launched.computation.outputs()
            except DeviceLost:
                raise
            except EngineError as error:  # it concerns the whole engine
                return StepResult((), self._fail_plan(launched.plan, error), idle=False)
            except Exception as error:  # noqa: BLE001 - as in _launch
                plan, computed = self._retry(launched, error)
        begun_s, self._collected_s = max(launched.launched_s, self._collected_s), self._clock()
        self.history.ran(plan, self._collected_s - begun_s)
        if self.costs is not None:
            self.costs.ran(plan, self._collected_s - begun_s)
        if self.watch is not None:
            self.watch(plan, self._collected_s - begun_s)
        return self._commit(plan, computed)

    def _retry(self, failed: _Launch, error: Exception) -> tuple[StepPlan, StepOutputs]:
        """Compute a step again that raised. One that was launched after it is void: it read its tokens."""
        later = self._take_launched()
        if later is not None:
            self._discard(later)
        with self._lock:
            plan = self._scheduler.retry(failed.plan)
        if not plan.slices:  # whoever was in it has left
            return plan, StepOutputs((), ())
        retry = StepRetry(self._executor, plan, failed.lease)
        return plan, retry.run(error, len(failed.plan.slices))

    def _discard(self, launched: _Launch) -> None:
        """Wait for a step whose outputs are void, and let its adapters go."""
        with launched.lease:
            try:
                launched.computation.outputs()
            except DeviceLost:
                raise
            except Exception as error:  # noqa: BLE001 - it is planned anew, and raises again if it must
                _log.debug("a void step failed", exc_info=error)

    def _commit(self, plan: StepPlan, computed: StepOutputs) -> StepResult:
        with self._lock:
            failures: tuple[Failure, ...] = ()
            for keys, error in computed.failed:
                failures += self._end_awaited(plan, set(keys), error) if keys else ()
            events = self._scheduler.commit(plan, computed.outputs)
            self._release(event.key.request_id for event in events if event.finish_reason)
            events = self._probes.take_events(events)
        self.steps += 1
        return StepResult(events, failures, idle=False)

    def _fail_plan(self, plan: StepPlan, error: EngineError) -> tuple[Failure, ...]:
        _log.error("a step of %d sequences failed", len(plan.slices), exc_info=error)
        with self._lock:
            return self._end_awaited(plan, {part.key for part in plan.slices}, error)

    def _fail_unloadable(self) -> tuple[Failure, ...]:
        failed = self._store.failed()
        if not failed:
            return ()
        failures: list[Failure] = []
        for digest, cause in failed.items():
            ids = [name for name, ref in self._adapters.items() if ref.digest == digest]
            failures += self._end(ids, AdapterFailed(str(cause)))
        return tuple(failures)

    def _fail_late(self) -> tuple[Failure, ...]:
        """Give up what waits although its first token is overdue: to draw it now would delay the rest."""
        late = self._scheduler.late(self._clock())
        return self._end(late, _LATE) if late else ()

    def _end_awaited(self, plan: StepPlan, keys: Set[SequenceKey], error: EngineError) -> tuple[Failure, ...]:
        """End the requests of those of the plan's sequences that still wait for it."""
        awaited = [part.key for part in self._scheduler.awaited(plan)]
        return self._end([key.request_id for key in awaited if key in keys], error)

    def _end(self, request_ids: Iterable[str], error: EngineError) -> tuple[Failure, ...]:
        distinct = tuple(dict.fromkeys(request_ids))
        for request_id in distinct:
            self._scheduler.abort(request_id)
        self._release(distinct)
        return self._probes.take_failures(tuple(Failure(request_id, error) for request_id in distinct))

    def _release(self, request_ids: Iterable[str]) -> None:
        """Release the adapters of those of the requests that have no live sequence left."""
        for request_id in request_ids:
            if request_id in self._adapters and not self._scheduler.is_live(request_id):
                self._store.release(self._adapters.pop(request_id))
