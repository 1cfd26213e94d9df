"""Serve one engine to clients on an event loop: names become adapters, requests become outputs.

The step loop runs in a thread of its own; everything else here runs on the event loop. The two meet in
EngineCore, which its lock guards, and in `call_soon_threadsafe`.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from engine.admission import Admission
from engine.assembly.assembly import Engine
from engine.errors import (
    Draining,
    EngineError,
    EngineStopped,
    StepFailed,
    adapter_errors,
)
from engine.metrics.telemetry import EngineStats, Telemetry
from engine.output import RequestOutput
from engine.step_result import StepResult
from engine.tokenizer import Tokenizer
from engine.waiting.adapter_names import AdapterNames
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterEntry, AdapterRef
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from scheduler.plan import FinishReason, TokenEvent
from scheduler.request import Request, SamplingParams

_CLOSE_S = 10.0  # for each part of the engine to end when it closes
_IDLE_POLL_S = 0.5
_log = logging.getLogger(__name__)


class AsyncEngine:
    """EngineClient of an engine in this process."""

    def __init__(self, engine: Engine, telemetry: Telemetry, max_waiting: int) -> None:
        """Take over `engine`, which `close` closes; at most `max_waiting` sequences wait to run."""
        self.tokenizer, self.telemetry = engine.tokenizer, telemetry
        self.created_s = int(time.time())
        self._core, self._store, self._card = engine.core, engine.store, engine.card
        self._peers, self._close_engine = engine.peers, engine.close
        self._admission = Admission(max_waiting, lambda: self._core.live().waiting)
        self._tokenizer_of, self._end_tokens_of = engine.tokenizer_of, engine.end_tokens_of
        self._outputs: dict[str, RequestOutput] = {}  # by request id, of requests that have not ended
        self._models: dict[str, str] = {}  # of the same requests, the names that they asked for
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._ended = asyncio.Event()  # set when the last request has ended
        self._draining = False
        self.failure: EngineStopped | None = None  # what ended the step loop, if not `close`
        self._on_failure: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._names = AdapterNames(self._card.names, self._store.registry, self._peers is not None)

    @property
    def model_name(self) -> str:
        """The name that responses call the base model by."""
        return self._card.names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the base model, `model_name` first."""
        return self._card.names

    @property
    def model_root(self) -> str:
        """Where the base model came from."""
        return self._card.root

    @property
    def peer_address(self) -> str | None:
        """Where peers may pull this engine's adapters."""
        return str(self._peers.address) if self._peers else None

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._card.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._card.vocab_size

    def tokenizer_of(self, model: str) -> Tokenizer:
        """Return the tokenizer of `model`, with its own chat template. As EngineClient.tokenizer_of."""
        with adapter_errors(model):
            return self._tokenizer_of(model)

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call `callback`, on the event loop, when an error has ended the step loop."""
        self._on_failure = callback

    async def start(self) -> None:
        """Start the step loop."""
        self._loop = asyncio.get_running_loop()
        self._store.loader.on_ready(self._wake.set)
        self._thread.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what runs to end."""
        self._draining = True
        self._ended.clear()
        if self._outputs:
            try:
                await asyncio.wait_for(self._ended.wait(), timeout_s)
            except TimeoutError:
                _log.warning("%d requests were still running after %g s", len(self._outputs), timeout_s)

    async def close(self) -> None:
        """Stop the step loop after its current step and end what still runs with an error."""
        self._draining = True
        self._stopping.set()
        self._wake.set()
        closing = TaskPool("closing", 4, _CLOSE_S)
        if self._thread.is_alive():
            await closing.run_or_leave("the step under way", self._thread.join)
        if self.failure is None:
            await closing.run_or_leave("the step under way", self._core.wait_for_step)
            self._end_all(Draining(), FinishReason.ABORT.value)
        else:
            self._end_all(self.failure, "error")
        if self._peers is not None:
            await closing.run_or_leave("the connections to peers", self._peers.close)
        await closing.run_or_leave("the engine", self._close_engine)
        self._names.close()
        closing.close()

    async def submit(
        self, model: str, prompt_token_ids: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> RequestOutput:
        """Queue one request; see `submit_all`."""
        (output,) = await self.submit_all(model, {request_id: prompt_token_ids}, params)
        return output

    async def submit_all(
        self, model: str, prompts: Mapping[str, tuple[int, ...]], params: SamplingParams
    ) -> tuple[RequestOutput, ...]:
        """Queue a request for `model` (the base or an adapter) for each of `prompts`, whose keys are request ids.

        Raises UnknownModel, InvalidAdapter, InvalidParameter, RequestRefused (one can never run), TooManySequences,
        Overloaded, Draining or EngineStopped; then none is queued.
        """
        self._check_open()
        with self._admission.places(len(prompts) * params.n):
            adapter = await self._names.resolve(model)
        self._check_open()
        # Nothing else runs on the event loop until all are queued, so that all are, or none.
        outputs, now_s = list[RequestOutput](), time.monotonic()
        try:
            with adapter_errors(model):
                eos = self._end_tokens_of(model)
            for request_id, prompt in prompts.items():
                seed = random.getrandbits(63) if params.seed is None else params.seed
                request = Request(request_id, prompt, adapter, replace(params, seed=seed), eos, now_s)
                outputs.append(self._queue(model, request))
        except BaseException:
            for output in outputs:
                await output.aclose()
            raise
        self._wake.set()
        return tuple(outputs)

    def _queue(self, model: str, request: Request) -> RequestOutput:
        with adapter_errors(model):
            self._core.submit(request)
        # Both are set before the event loop runs again, hence before any event.
        output = self._outputs[request.request_id] = RequestOutput(request, self.tokenizer, self._abort)
        self._models[request.request_id] = model
        self.telemetry.started(model)
        return output

    async def load_adapter(
        self, name: str, folder: Path, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        """Read, check and register an adapter, off the step loop. Raises what AdapterNames.load raises."""
        return await self._names.load(name, folder, replaces, roots)

    async def unload_adapter(self, name: str) -> None:
        """Forget a name at once; requests that run under it finish. Raises UnknownModel."""
        self._names.unload(name)

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """List the adapters that requests may name."""
        return self._names.entries()

    def may_serve(self, model: str) -> bool:
        """Return False if `model` is neither the base nor an adapter; True also for what a peer may have."""
        return self._names.may_serve(model)

    def stats(self) -> EngineStats:
        """Describe the engine at this moment."""
        live = self._core.live()
        return EngineStats(
            running=live.running,
            waiting=live.waiting,
            preemptions=live.preemptions,
            steps=self._core.steps,
            healthy=self._thread.is_alive() and self.failure is None and not self._draining,
            blocks=self._core.block_stats(),
            store=self._store.stats(),
        )

    def _check_open(self) -> None:
        """Raise EngineStopped or Draining if nothing new is taken."""
        if self.failure is not None:
            raise self.failure
        if self._draining:
            raise Draining

    def _abort(self, request_id: str) -> None:
        """End a request whose client has left."""
        self._core.abort(request_id)
        self._forget(request_id, FinishReason.ABORT.value)

    def _end_all(self, error: EngineError, reason: str) -> None:
        """End what still runs with an error; a core that has failed is not touched any more."""
        for request_id in tuple(self._outputs):
            if self.failure is None:
                self._core.abort(request_id)
            if (output := self._forget(request_id, reason)) is not None:
                output.fail(error)

    def _forget(self, request_id: str, reason: str) -> RequestOutput | None:
        output = self._outputs.pop(request_id, None)
        if output is not None:
            model, prompt_tokens = self._models.pop(request_id), len(output.request.prompt_token_ids)
            self.telemetry.finished(model, reason, prompt_tokens, output.output_tokens)
        if not self._outputs:
            self._ended.set()
        return output

    def _run(self) -> None:
        assert self._loop is not None, "start() sets the loop before the thread"
        self._core.driving.acquire()  # for good: when this loop has ended, nothing steps any more
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                result = self._core.step()
            except Exception as error:  # noqa: BLE001 - whatever escapes must not leave requests waiting
                _log.critical("the step loop has ended by an error", exc_info=error)
                self.failure = error if isinstance(error, EngineStopped) else EngineStopped(error)
                self._loop.call_soon_threadsafe(self._fail, self.failure)
                return
            if result.events or result.failures:
                self._loop.call_soon_threadsafe(self._deliver, result)
            if result.idle:
                self._wake.wait(_IDLE_POLL_S)

    def _fail(self, failure: EngineStopped) -> None:
        """End what runs, now that nothing will come of it, and tell whoever watches."""
        self._end_all(failure, "error")
        self._on_failure()

    def _deliver(self, result: StepResult) -> None:
        now_s = time.monotonic()
        for event in result.events:
            output = self._outputs.get(event.key.request_id)
            if output is not None:
                self._try_to_push(output, event, now_s)
        for failure in result.failures:
            if (output := self._forget(failure.request_id, "error")) is not None:
                output.fail(failure.error)

    def _try_to_push(self, output: RequestOutput, event: TokenEvent, now_s: float) -> None:
        """Give an event to its output; what cannot be turned into text ends its own request."""
        try:
            self._push(output, event, now_s)
        except Exception:  # noqa: BLE001 - as of a step: it ends its own request
            request_id = event.key.request_id
            _log.exception("the tokens of %s could not be turned into text", request_id)
            self._core.abort(request_id)
            self._forget(request_id, "error")
            output.fail(StepFailed("the output could not become text; the server's log has the cause"))

    def _push(self, output: RequestOutput, event: TokenEvent, now_s: float) -> None:
        delta = output.push(event, now_s)
        if delta is None:
            return
        if delta.token_ids:
            model, times_s = self._models[event.key.request_id], output.token_times_s[delta.index]
            if len(times_s) > 1:
                self.telemetry.next_token(model, times_s[-1] - times_s[-2])
            else:
                self.telemetry.first_token(model, times_s[0])
        if delta.finish_reason is None:
            return
        if event.finish_reason is None:
            self._core.finish(event.key)
        if not output.is_open:
            self._forget(event.key.request_id, delta.finish_reason.value)
