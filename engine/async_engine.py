"""AsyncEngine: the asyncio front desk of one engine. Names become adapters, requests become streams of Deltas.

The step loop runs in a thread of its own; everything else here runs on the event loop. The two meet in
EngineCore, which its lock guards, and in `call_soon_threadsafe`.
"""

import asyncio
import logging
import random
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from engine.build.assembly import Engine
from engine.core import StepResult
from engine.errors import (
    AdapterFailed,
    Draining,
    InvalidAdapterName,
    Overloaded,
    PeersSilent,
    UnknownModel,
)
from engine.output import OutputStream, RequestOutput
from engine.telemetry import Telemetry
from lora.adapter import BASE, AdapterRef
from lora.errors import AdapterRefused, AdapterUnreachable, UnknownAdapter
from lora.names import AdapterEntry, is_name
from lora.store.store import StoreStats
from scheduler.blocks import BlockStats
from scheduler.plan import FinishReason, TokenEvent
from scheduler.request import Request, SamplingParams

_RETRY_AFTER_S = 1
_IDLE_POLL_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and health: sequences, steps, K/V blocks, resident adapters."""

    running: int
    waiting: int
    preemptions: int
    steps: int
    healthy: bool
    blocks: BlockStats
    store: StoreStats


class AsyncEngine:
    """One engine and its clients."""

    def __init__(self, engine: Engine, telemetry: Telemetry, max_waiting: int) -> None:
        self.codec = engine.codec
        self.telemetry = telemetry
        self.created_s = int(time.time())
        self._core, self._store, self._card = engine.core, engine.store, engine.card
        self._peers = engine.peers
        self._close_engine = engine.close
        self._max_waiting = max_waiting
        self._streams: dict[str, OutputStream] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._empty = asyncio.Event()
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def model_name(self) -> str:
        """The name that requests to the base model give."""
        return self._card.name

    @property
    def model_root(self) -> str:
        """Where the base model came from."""
        return self._card.root

    @property
    def peer_address(self) -> str | None:
        """Where peers may pull this node's adapters."""
        return str(self._peers.address) if self._peers else None

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._card.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._card.vocab_size

    async def start(self) -> None:
        """Start the step loop."""
        self._loop = asyncio.get_running_loop()
        self._store.on_ready(self._wake.set)
        self._thread.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what runs to end."""
        self._draining = True
        self._empty.clear()
        if self._streams:
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                _log.warning("%d requests were still running after %g s", len(self._streams), timeout_s)

    async def close(self) -> None:
        """Stop the step loop after its current step and end what still runs with an error."""
        self._draining = True
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(self._core.settle)
        for request_id in tuple(self._streams):
            self._core.abort(request_id)
            if (stream := self._forget(request_id, FinishReason.ABORT.value)) is not None:
                stream.fail(Draining())
        if self._peers is not None:
            await asyncio.to_thread(self._peers.close)
        await asyncio.to_thread(self._close_engine)

    async def submit(
        self, model: str, prompt_token_ids: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> OutputStream:
        """Queue a request for `model` (the base or an adapter).

        Raises UnknownModel, RequestRefused (it can never run), Overloaded or Draining; then nothing is queued.
        """
        if self._draining:
            raise Draining
        waiting = self._core.live().waiting
        if waiting + params.n > self._max_waiting:
            raise Overloaded(waiting, self._max_waiting, _RETRY_AFTER_S)
        adapter = await self._resolve(model)
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        request = Request(
            request_id, prompt_token_ids, adapter, params, self._card.eos_token_ids, time.monotonic()
        )
        try:
            self._core.submit(request)
        except UnknownAdapter:
            raise UnknownModel(model) from None
        stream = OutputStream(RequestOutput(request, self.codec), model, self._withdraw)
        self._streams[request_id] = stream  # before the event loop runs again, hence before any event
        self.telemetry.started(model)
        self._wake.set()
        return stream

    async def load_adapter(self, name: str, folder: Path) -> AdapterRef:
        """Read, check and register an adapter, off the step loop. Raises what lora.format.peft refuses with."""
        if name == self._card.name:
            raise InvalidAdapterName(name, "the base model has that name")
        return await asyncio.to_thread(self._store.load, name, folder)

    async def unload_adapter(self, name: str) -> None:
        """Forget a name at once; requests that run under it finish. Raises UnknownModel."""
        try:
            await asyncio.to_thread(self._store.unload, name)
        except UnknownAdapter:
            raise UnknownModel(name) from None

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """The adapters that requests may name."""
        return self._store.entries()

    def may_serve(self, model: str) -> bool:
        """False if `model` is neither the base model nor an adapter; True also for what a peer may have."""
        known = model == self._card.name or model in self._store.names()
        return known or (self._peers is not None and is_name(model))

    def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        live = self._core.live()
        return EngineStats(
            running=live.running,
            waiting=live.waiting,
            preemptions=live.preemptions,
            steps=self._core.steps,
            healthy=self._thread.is_alive() and not self._draining,
            blocks=self._core.block_stats(),
            store=self._store.stats(),
        )

    async def _resolve(self, model: str) -> AdapterRef:
        if model == self._card.name:
            return BASE
        if (known := self._store.known(model)) is not None:
            return known
        try:
            return await asyncio.to_thread(self._store.resolve, model)
        except UnknownAdapter:
            raise UnknownModel(model) from None
        except AdapterUnreachable as error:
            raise PeersSilent(str(error)) from error
        except AdapterRefused as error:
            raise AdapterFailed(str(error)) from error

    def _withdraw(self, request_id: str) -> None:
        """Abort a request whose client has gone."""
        self._core.abort(request_id)
        self._forget(request_id, FinishReason.ABORT.value)

    def _forget(self, request_id: str, reason: str) -> OutputStream | None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            answer = stream.answer
            prompt_tokens = len(answer.request.prompt_token_ids)
            self.telemetry.finished(stream.adapter_name, reason, prompt_tokens, answer.output_tokens)
        if not self._streams:
            self._empty.set()
        return stream

    def _run(self) -> None:
        assert self._loop is not None, "start() sets the loop before the thread"
        while not self._stopping.is_set():
            self._wake.clear()
            result = self._core.step()
            if result.events or result.failures:
                self._loop.call_soon_threadsafe(self._deliver, result)
            if result.idle:
                self._wake.wait(_IDLE_POLL_S)

    def _deliver(self, result: StepResult) -> None:
        now_s = time.monotonic()
        for event in result.events:
            stream = self._streams.get(event.key.request_id)
            if stream is not None:
                self._hand_over(stream, event, now_s)
        for failure in result.failures:
            if (stream := self._forget(failure.request_id, "error")) is not None:
                stream.fail(failure.error)

    def _hand_over(self, stream: OutputStream, event: TokenEvent, now_s: float) -> None:
        delta = stream.answer.push(event)
        if delta is None:
            return
        if delta.token_ids:
            first, elapsed_s = stream.elapsed_s(delta.index, now_s)
            observe = self.telemetry.first_token if first else self.telemetry.next_token
            observe(stream.adapter_name, elapsed_s)
        stream.put(delta)
        if delta.finish_reason is None:
            return
        if event.finish_reason is None:
            self._core.finish(event.key)
        if not stream.answer.open:
            self._forget(event.key.request_id, delta.finish_reason.value)
