"""Serve one engine to clients on an event loop: names become adapters, requests become outputs."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from engine.admission import Admission
from engine.assembly.assembly import Engine
from engine.catalogue.catalogue_file import CatalogueFile
from engine.catalogue.local_catalogue import LocalCatalogue
from engine.errors import Draining, EngineStopped, NotFetched, adapter_errors
from engine.live.in_time import InTimeAdmission
from engine.live.live_outputs import LiveOutputs
from engine.live.request_spans import RequestSpans
from engine.live.step_loop import StepLoop
from engine.metrics.series import AdapterRequests, MetricSeries, census_series, gateway_series
from engine.metrics.snapshot import EngineStats
from engine.metrics.telemetry import Telemetry
from engine.output import RequestOutput
from engine.runner.step_history import StepRecord
from engine.structured.grammar_pool import GrammarPool
from engine.tenants.accounts import TenantAccounts
from engine.tenants.usage_counts import UsageCounts
from engine.tokenizer import Tokenizer
from engine.waiting.adapter_names import AdapterNames
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterEntry, AdapterRef
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.sources.source_url import AdapterSource
from scheduler.plan import FinishReason, SequenceKey
from scheduler.request import NOWHERE, Origin, Request, SamplingParams

_CLOSE_S = 10.0  # for each part of the engine to end when it closes

NamesByState = Callable[[], tuple[set[str], set[str]]]
"""Returns the adapters under which tokens are drawn, and those under which some request has none yet."""


class AsyncEngine:
    """EngineClient of an engine in this process."""

    def __init__(
        self,
        engine: Engine,
        telemetry: Telemetry,
        max_waiting: int,
        file: CatalogueFile | None = None,
        roots: AllowedRoots = ANYWHERE,
        most_running: int = 256,
    ) -> None:
        """Take over `engine`, which `close` closes; at most `max_waiting` sequences wait to run, and
        `most_running` run at once.

        What clients ask of adapters is kept in `file`, if there is one; its names are read from below `roots`.
        """
        self.tokenizer, self.telemetry = engine.tokenizer, telemetry
        self.created_s = int(time.time())
        spans = RequestSpans(telemetry.tracing)
        self.step_loop = StepLoop(engine.core, engine.store.loader, spans)
        if telemetry.tracing is not None:
            engine.core.watch = spans.ran
        self._core, self._store, self._card = engine.core, engine.store, engine.card
        self._peers, self._close_engine = engine.peers, engine.close
        self._admission = Admission(max_waiting, lambda: self._core.live().waiting)
        self._tokenizer_of, self._end_tokens_of = engine.tokenizer_of, engine.end_tokens_of
        self.grammars = GrammarPool(engine.grammars)
        self.accounts = TenantAccounts(engine.card.names, engine.card.max_model_len, weigh=engine.turns.weigh)
        self._outputs = LiveOutputs(engine.tokenizer, telemetry, self._finish, self._abort, self.accounts)
        self._in_time: InTimeAdmission | None = None
        self._draining, self._most_running = False, most_running
        self.linked_names: NamesByState = lambda: (set(), set())  # of requests that routers sent
        self._names = AdapterNames(self._card.names, self._store.registry, self._peers is not None)
        self.catalogue = LocalCatalogue(self._store, self._names, self._outputs, file, roots)

    def keep_in_time(self, admission: InTimeAdmission) -> None:
        """Refuse from now on what `admission` predicts to be late; to be called before anything is submitted."""
        self._in_time = admission
        admission.tell(self._outputs)

    @property
    def usage(self) -> UsageCounts:
        """What tenants use."""
        return self._outputs.usage

    @property
    def failure(self) -> EngineStopped | None:
        """What ended the step loop, if not `close`."""
        return self.step_loop.failure

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
        if self._names.may_fetch(model):
            raise NotFetched(model)
        with adapter_errors(model):
            return self._tokenizer_of(model)

    async def find(self, model: str) -> None:
        """Have what `model` means fetched. As EngineClient.find."""
        await self._names.find(model)

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call `callback`, on the event loop, when an error has ended the step loop."""
        self.step_loop.on_failure(callback)

    async def start(self) -> None:
        """Start the step loop. Raises InvalidConfig for a registry file that is damaged."""
        self.step_loop.start()
        await self.catalogue.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what runs to end."""
        self._draining = True
        await self._outputs.drain(timeout_s)

    async def close(self) -> None:
        """Stop the step loop after its current step and end what still runs with an error."""
        self._draining = True
        closing = TaskPool("closing", 4, _CLOSE_S)
        await self.step_loop.close(closing)
        if self.failure is None:
            self._outputs.end_all(Draining(), FinishReason.ABORT.value)
        else:
            self._outputs.end_all(self.failure, "error")
        if self._peers is not None:
            await closing.run_or_leave("the connections to peers", self._peers.close)
        await closing.run_or_leave("the engine", self._close_engine)
        await self.catalogue.close()
        self._names.close()
        self.grammars.close()
        closing.close()

    async def submit(
        self, model: str, prompt_token_ids: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> RequestOutput:
        """Queue one request; see `submit_all`."""
        (output,) = await self.submit_all(model, {request_id: prompt_token_ids}, params)
        return output

    async def submit_all(
        self, model: str, prompts: Mapping[str, tuple[int, ...]], params: SamplingParams, origin: Origin = NOWHERE
    ) -> tuple[RequestOutput, ...]:  # fmt: skip
        """Queue a request for `model` (the base or an adapter) for each of `prompts`, whose keys are request ids.

        Raises UnknownModel, InvalidAdapter, InvalidParameter, RequestRefused (one can never run), TooManySequences,
        BeyondLimit, RateLimited, Overloaded, NotAdmitted, Draining or EngineStopped; then none is queued.
        """
        with self._outputs.refusals(origin.tenant, model, lambda: self._is_known(model)):
            return await self._submit_all(model, prompts, params, origin)

    async def _submit_all(
        self, model: str, prompts: Mapping[str, tuple[int, ...]], params: SamplingParams, origin: Origin
    ) -> tuple[RequestOutput, ...]:
        self._check_open()
        priority = self.accounts.check_access(origin, model)
        target = self.catalogue.aliases.target_of(model, origin.cache_salt or next(iter(prompts)))
        await self._names.find(target)  # without a place in the queue: a source may be slow
        with self._admission.places(len(prompts) * params.n):
            grammar = await self.grammars.compile(params)
            adapter = await self._names.resolve(target)
        self._check_open()
        self._outputs.uses.check(model, len(prompts), self.catalogue.max_requests(model))
        self.accounts.check(origin.tenant, model, prompts.values(), params)
        # Nothing else runs on the event loop until all are queued, so that all are, or none.
        requests, outputs, now_s = list[Request](), list[RequestOutput](), time.monotonic()
        try:
            with adapter_errors(target):
                eos = self._end_tokens_of(target)
            for request_id, prompt in prompts.items():
                seed = random.getrandbits(63) if params.seed is None else params.seed
                request = Request(
                    request_id, prompt, adapter, replace(params, seed=seed), eos, now_s,
                    first_token_by_s=None if self._in_time is None else self._in_time.first_token_by_s(now_s),
                    tenant=origin.tenant, priority=priority, trace=origin.trace, grammar=grammar,
                    cache_salt=origin.cache_salt,
                )  # fmt: skip
                requests.append(request)
            if self._in_time is not None:
                self._in_time.check(requests, now_s)
            for request in requests:
                outputs.append(self._queue(model, target, request))
        except BaseException:
            for output in outputs:
                await output.aclose()
            raise
        self.step_loop.wake()
        return tuple(outputs)

    def _is_known(self, model: str) -> bool:
        return model in self._card.names or self._names.known(model) is not None

    def _queue(self, model: str, target: str, request: Request) -> RequestOutput:
        with adapter_errors(target):
            self.step_loop.submit(request, self._outputs if self._in_time is None else self._in_time)
        if self._in_time is not None:
            self._in_time.begin(request)
        # Before the event loop runs again, hence before any event.
        return self._outputs.open(request, model, target)

    def _finish(self, key: SequenceKey) -> None:
        self.step_loop.finish(key)
        if self._in_time is not None:
            self._in_time.ended(key)

    def _abort(self, request_id: str) -> None:
        self.step_loop.abort(request_id)
        if self._in_time is not None:
            self._in_time.end(request_id)

    async def load_adapter(
        self, name: str, folder: AdapterSource, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        """Read, check and register an adapter, off the step loop. Raises what AdapterNames.load raises."""
        return await self.catalogue.load(name, folder, replaces, roots)

    async def unload_adapter(self, name: str) -> None:
        """Forget a name at once; requests that run under it finish. Raises UnknownModel."""
        await self.catalogue.unload(name)

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """List the adapters that requests may name."""
        return self._names.entries()

    def may_serve(self, model: str) -> bool:
        """Return False if `model` is neither the base nor an adapter; True also for what a peer may have."""
        return self._names.may_serve(model)

    def series(self) -> tuple[MetricSeries, ...]:
        """Tell adapters by tier and rank, refusals, holds, and what gateways choose by."""
        live, blocks, recent = self._core.live(), self._core.block_stats(), self.telemetry.recent()
        own, linked = self._outputs.names_by_state(), self.linked_names()
        running, waiting = (
            tuple(name for name in here | there if name not in self._card.names)
            for here, there in zip(own, linked, strict=True)
        )
        total = blocks.used + blocks.cached + blocks.free
        adapters = AdapterRequests(running, waiting, self._most_running)
        return (
            *gateway_series(
                self.model_name, live.running, live.waiting, blocks.used / max(1, total), adapters,
                max(1, len(recent)),
            ),
            *census_series(self._store.stats().census),
            *self.catalogue.series(recent),
            self.telemetry.refusals.series(),
        )  # fmt: skip

    def recent_steps(self) -> list[StepRecord]:
        """Describe the last steps, the newest first."""
        return self._core.history.last()

    def stats(self) -> EngineStats:
        """Describe the engine at this moment."""
        live = self._core.live()
        return EngineStats(
            running=live.running,
            waiting=live.waiting,
            preemptions=live.preemptions,
            steps=self._core.steps,
            trouble=str(Draining()) if self._draining else self.step_loop.trouble,
            blocks=self._core.block_stats(),
            store=self._store.stats(),
        )

    def _check_open(self) -> None:
        """Raise EngineStopped or Draining if nothing new is taken."""
        if self.failure is not None:
            raise self.failure
        if self._draining:
            raise Draining
