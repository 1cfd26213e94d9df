"""Be an engine to the API, with nodes that compute: names become adapters, requests are offered, tokens become text."""

import random
import time
from collections.abc import Mapping
from dataclasses import replace

from engine.admission import Admission
from engine.base.model_card import ModelCard
from engine.catalogue.alias_targets import chosen_target
from engine.catalogue.base import CatalogueEntry
from engine.cluster.router.cluster_catalogue import ClusterCatalogue
from engine.cluster.router.forwarding import Forwarding
from engine.cluster.router.forwarding_account import ForwardingSpans
from engine.cluster.router.name_finder import NameFinder
from engine.cluster.router.router_series import RouterSeries
from engine.cluster.view import AdapterAdministration, ClusterView
from engine.errors import Draining, InvalidAdapter, NotFetched, NotInTime, UnknownModel
from engine.live.live_outputs import LiveOutputs
from engine.metrics.series import MetricSeries
from engine.metrics.snapshot import EngineStats
from engine.metrics.telemetry import Telemetry
from engine.output import RequestOutput
from engine.structured.grammar_cache import GrammarCache
from engine.structured.grammar_pool import GrammarPool
from engine.tenants.accounts import TenantAccounts
from engine.tenants.usage_counts import UsageCounts
from engine.tokenizer import Tokenizer
from lora.adapter import BASE, AdapterEntry, AdapterRef
from lora.format.adapter_files import Flaw
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.sources.source_url import AdapterSource
from lora.store.stats import StoreStats
from scheduler.blocks import BlockStats
from scheduler.cluster.routing.orders import Offer
from scheduler.cluster.routing.prefix_index import prefix_chunks
from scheduler.limits import check_length
from scheduler.plan import FinishReason
from scheduler.request import NOWHERE, Origin, Request, SamplingParams

_NO_BLOCKS = BlockStats(0, 0, 0, 0, 0)
_NO_STORE = StoreStats(0, 0, 0, 0, 0, 0.0, 0, {})


class ClusterClient:
    """EngineClient of a whole cluster. Used on one event loop."""

    def __init__(
        self,
        model: ModelCard,
        tokenizer: Tokenizer,
        telemetry: Telemetry,
        forwarding: Forwarding,
        view: ClusterView,
        administration: AdapterAdministration,
        max_waiting: int,
        slo_ttft_s: float,
        finder: NameFinder | None = None,
    ) -> None:
        """Serve `model` by the nodes of `view`. At most `max_waiting` sequences wait to be sent."""
        self.tokenizer, self.telemetry = tokenizer, telemetry
        self.created_s = int(time.time())
        self.view = view
        self.forwarding = forwarding
        self._model, self._administration = model, administration
        self._finder = finder or NameFinder(view, administration, None, 0.0)
        self.accounts = TenantAccounts(model.names, model.max_model_len, weigh=forwarding.router.weigh)
        self._outputs = LiveOutputs(tokenizer, telemetry, forwarding.finish, forwarding.abort, self.accounts)
        forwarding.outputs, forwarding.spans = self._outputs, ForwardingSpans(telemetry.tracing)
        self.catalogue = ClusterCatalogue(view, administration, forwarding, self._outputs)
        self._series = RouterSeries(view, forwarding, self._outputs, telemetry.refusals)
        self._admission = Admission(max_waiting, lambda: forwarding.router.waiting)
        self._slo_ttft_s = slo_ttft_s
        self._grammars = GrammarPool(GrammarCache(lambda: tokenizer.table(model.vocab_size)))
        self._draining = False

    @property
    def usage(self) -> UsageCounts:
        """What tenants use."""
        return self._outputs.usage

    @property
    def model_name(self) -> str:
        """The name that responses call the base model by."""
        return self._model.names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the base model, `model_name` first."""
        return self._model.names

    @property
    def model_root(self) -> str:
        """Where the base model came from."""
        return self._model.root

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together, of any node that is connected."""
        told = [ready.max_model_len for ready in self.forwarding.ready.values()]
        return min([self._model.max_model_len, *told])

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._model.vocab_size

    def tokenizer_of(self, model: str) -> Tokenizer:
        """Return the tokenizer of `model`, with its own chat template. As EngineClient.tokenizer_of."""
        if self._may_find(model):
            raise NotFetched(model)
        entry = self._entry(model)
        if entry is None:
            return self.tokenizer
        try:
            return self.tokenizer.of_adapter(entry.companions)
        except Flaw as error:
            raise InvalidAdapter(str(error)) from error

    async def find(self, model: str) -> None:
        """Have a node fetch what `model` means. As EngineClient.find."""
        if self._may_find(model):
            await self._finder.find(model)

    async def start(self) -> None:
        """Link to the nodes, those of now and those to come."""
        self.view.changed.append(self._follow)
        self._follow()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what runs to end."""
        self._draining = True
        await self._outputs.drain(timeout_s)

    async def close(self) -> None:
        """End what still runs with an error, and close the links."""
        self._draining = True
        if self._follow in self.view.changed:
            self.view.changed.remove(self._follow)
        self._outputs.end_all(Draining(), FinishReason.ABORT.value)
        await self._finder.close()
        await self.forwarding.close()
        self.tokenizer.close()
        self._grammars.close()

    async def submit(
        self, model: str, prompt_token_ids: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> RequestOutput:
        """Offer one request; see `submit_all`."""
        (output,) = await self.submit_all(model, {request_id: prompt_token_ids}, params)
        return output

    async def submit_all(
        self, model: str, prompts: Mapping[str, tuple[int, ...]], params: SamplingParams, origin: Origin = NOWHERE
    ) -> tuple[RequestOutput, ...]:  # fmt: skip
        """Offer a request for each of `prompts`, whose keys are request ids: all of them or none.

        Raises as EngineClient.submit_all; a request that no node takes in time fails by its output.
        """

        def is_known() -> bool:
            return model in self._model.names or model in self.view.catalogue

        with self._outputs.refusals(origin.tenant, model, is_known):
            priority = self.accounts.check_access(origin, model)
            target = self._target_of(model, origin.cache_salt or next(iter(prompts)))
            await self.find(target)
            with self._admission.places(len(prompts) * params.n):
                await self._grammars.compile(params)  # nodes do so again: here a client is told what is wrong
            return self._submit_all(model, target, prompts, params, replace(origin, priority=priority))

    def _submit_all(
        self,
        model: str,
        target: str,
        prompts: Mapping[str, tuple[int, ...]],
        params: SamplingParams,
        origin: Origin,
    ) -> tuple[RequestOutput, ...]:
        if self._draining:
            raise Draining
        entry, now_s = self._entry(target), time.monotonic()
        adapter = BASE if entry is None else entry.ref
        ends = (*self._model.eos_token_ids, *self.tokenizer_of(target).eos_token_ids)
        eos = tuple(dict.fromkeys(ends))
        requests: list[Request] = []
        with self._admission.places(len(prompts) * params.n):
            for request_id, prompt in prompts.items():
                seed = random.getrandbits(63) if params.seed is None else params.seed
                request = Request(
                    request_id, prompt, adapter, replace(params, seed=seed), eos, now_s,
                    priority=origin.priority, first_token_by_s=now_s + self._slo_ttft_s, tenant=origin.tenant,
                    trace=origin.trace, cache_salt=origin.cache_salt,
                )  # fmt: skip
                check_length(request, self.max_model_len)
                requests.append(request.within(self.vocab_size))
        asked = self.view.catalogue.get(model)
        most = asked.max_requests if asked is not None and entry is not None else 0
        self._outputs.uses.check(model, len(prompts), self.accounts.share.count(most))
        self.accounts.check(origin.tenant, model, prompts.values(), params)
        outputs = [self._outputs.open(request, model, target) for request in requests]
        for request in requests:
            self.forwarding.offer(request, _offer(request))
        return tuple(outputs)

    async def load_adapter(
        self, name: str, folder: AdapterSource, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        """Have a node read, check and try an adapter, and let the name mean it everywhere."""
        return (await self._administration.register(name, folder, replaces)).ref

    async def unload_adapter(self, name: str) -> None:
        """Let a name mean nothing any more; requests that run under it finish. Raises UnknownModel."""
        await self._administration.remove(name)

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """List the adapters that requests may name."""
        return tuple(
            AdapterEntry(entry.name, None, entry.ref, effect=entry.effect)
            for entry in self.view.catalogue.values()
        )

    def may_serve(self, model: str) -> bool:
        """Return False if `model` is neither the base nor an adapter; True also before that can be told."""
        known = model in self._model.names or model in self.view.catalogue
        return known or self._trouble() is not None or self._may_find(model)

    def series(self) -> tuple[MetricSeries, ...]:
        """Tell sums over the nodes, what was sent, moved and refused, and the shares of recent adapters."""
        return self._series.collect(self.model_name, self.telemetry.recent())

    def recent_steps(self) -> None:
        """Describe none: a router computes nothing."""

    def stats(self) -> EngineStats:
        """Describe the router at this moment: healthy while a node can be reached."""
        waiting = self.forwarding.router.waiting
        return EngineStats(
            running=len(self.forwarding) - waiting,
            waiting=waiting,
            preemptions=0,
            steps=0,
            trouble=self._trouble(),
            blocks=_NO_BLOCKS,
            store=_NO_STORE,
        )

    def _trouble(self) -> str | None:
        if self._draining:
            return str(Draining())
        if not self.view.known:
            return "this router has not heard from the coordinator yet"
        if self.forwarding.ready:
            return None
        joined = len(self.view.members)
        return f"none of {joined} nodes can be reached" if joined else "this cluster has no node"

    def _may_find(self, model: str) -> bool:
        return model not in self._model.names and self._finder.may_find(model)

    def _target_of(self, model: str, key: str) -> str:
        """Return the name whose meaning answers a request for `model`, as `chosen_target` does."""
        entry = None if model in self._model.names else self.view.catalogue.get(model)
        return model if entry is None else chosen_target(model, entry.targets, key)

    def _entry(self, model: str) -> CatalogueEntry | None:
        """Return what an adapter's name means; None for the base. Raises UnknownModel, NotInTime."""
        if model in self._model.names:
            return None
        entry = self.view.catalogue.get(model)
        if entry is not None:
            return entry
        if (trouble := self._trouble()) is not None:  # nodes that are to come may know it
            raise NotInTime(trouble, 1)
        raise UnknownModel(model)

    def _follow(self) -> None:
        self.forwarding.router.adopt(self.view.table)
        self.forwarding.follow(self.view.members)
        self.forwarding.advance()


def _offer(request: Request) -> Offer:
    return Offer(
        request_id=request.request_id,
        adapter=request.adapter,
        prompt_tokens=len(request.prompt_token_ids),
        tenant=request.tenant,
        priority=request.priority,
        chunks=prefix_chunks(
            request.adapter.digest, request.prompt_token_ids, request.adapted_from, request.cache_salt
        ),
    )
