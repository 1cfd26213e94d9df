"""An EngineClient whose model says what the test wants, one token at a time, as slowly as the test likes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from engine.catalogue.alias_targets import NO_ALIAS, Alias, Targets
from engine.catalogue.base import AdapterRecord, ClusterRecord, EntrySettings, NodeRecord, names_after
from engine.errors import (
    AdapterExists,
    Draining,
    EngineError,
    InvalidAdapter,
    InvalidAdapterName,
    TooManySequences,
    UnknownModel,
)
from engine.metrics.series import MetricSeries
from engine.metrics.telemetry import Telemetry
from engine.output import Delta, Detokenizer
from engine.runner.step_history import StepRecord
from engine.tenants.accounts import TenantAccounts
from engine.tenants.usage_counts import UsageCounts
from engine.tokenizer import Tokenizer
from lora.adapter import AdapterEntry, AdapterRef, is_name
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.peers.peer_stats import PeerStats, PublishStats
from lora.store.stats import StoreStats
from scheduler.blocks import BlockStats
from scheduler.limits import RequestRefused
from scheduler.plan import FinishReason, SequenceKey, TokenEvent, TokenLogprob
from scheduler.request import NOWHERE, Origin, SamplingParams
from tests.fakes.tokenizers import EOS

BLOCKS = BlockStats(used=1, cached=2, free=3, hit_tokens=4, queried_tokens=5)
STORE = StoreStats(
    resident=1,
    resident_bytes=4096,
    total_pages=16,
    free_pages=15,
    loads=2,
    load_s=0.25,
    evictions=1,
    hits={"host": 3, "disk": 1},
    seconds={"host": 0.25, "disk": 0.5},
    peers=PeerStats(refused=6),
    published=PublishStats(copies=2),
)


@dataclass(frozen=True, slots=True)
class Stats:
    """An engine's numbers for a scrape."""

    running: int
    waiting: int = 0
    preemptions: int = 4
    steps: int = 7
    trouble: str | None = None
    blocks: BlockStats = BLOCKS
    store: StoreStats = STORE


class FakeStream:
    """Deltas of one request; `closed` says that it was let go of, ended or not."""

    def __init__(self, client: "FakeClient", request_id: str, deltas: AsyncIterator[Delta]) -> None:
        self._client, self._request_id, self._deltas = client, request_id, deltas
        self.cached_tokens = client.cached_tokens
        self.adapter_digest = ""
        self.ended = False
        self.closed = asyncio.Event()

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Delta:
        try:
            return await anext(self._deltas)
        except (StopAsyncIteration, EngineError):
            self.ended = True
            self._client.live.pop(self._request_id, None)
            raise

    async def aclose(self) -> None:
        self.closed.set()
        if self._client.live.pop(self._request_id, None) is not None:
            self._client.aborted.append(self._request_id)
            self._client.abort_seen.set()


class FakeCatalogue:
    """A registry of the fake's adapters that does as it is told; `asked` are the settings by name."""

    def __init__(self, client: "FakeClient") -> None:
        self._client = client
        self.asked: dict[str, EntrySettings] = {}
        self.aliases: dict[str, Alias] = {}
        self.held: dict[str, float] = {}

    async def records(self, after: str, limit: int) -> list[AdapterRecord]:
        names = [entry.name for entry in self._client.adapters()]
        return [await self.record(name) for name in names_after(names, after, limit)]

    async def record(self, name: str) -> AdapterRecord:
        for entry in self._client.adapters():
            if entry.name == name:
                digest, asked = entry.ref.digest if entry.ref else None, self.asked.get(name, EntrySettings())
                pinned, most = asked.pinned or 0, asked.max_requests or 0
                source, alias = str(entry.folder), self.aliases.get(name, NO_ALIAS)
                return AdapterRecord(
                    name, digest, alias.target or None, source, pinned=pinned, max_requests=most,
                    held_s=self.held.get(name), targets=alias.targets,
                )  # fmt: skip
        raise UnknownModel(name)

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> None:
        folder = next((entry.folder for entry in self._client.adapters() if entry.name == target), None)
        if folder is None:
            raise UnknownModel(target)
        self._client.add(name, folder)
        self.aliases[name] = Alias(target, targets)

    async def set(self, name: str, settings: EntrySettings) -> None:
        known = self.asked.get(name, EntrySettings())
        await self.record(name)
        self.asked[name] = EntrySettings(
            known.pinned if settings.pinned is None else settings.pinned,
            known.max_requests if settings.max_requests is None else settings.max_requests,
        )

    async def hold(self, name: str, seconds: float) -> None:
        await self.record(name)
        self.held[name] = seconds

    async def release(self, name: str) -> None:
        await self.record(name)
        self.held.pop(name, None)

    async def abort(self, name: str) -> int:
        await self.record(name)
        return len(self._client.live)

    async def cluster(self) -> ClusterRecord:
        return ClusterRecord(7, 3, len(self._client.adapters()), [NodeRecord("n1", "serving")])


class FakeClient:
    """Scripted by its public fields.

    `says(model, prompt text)` is the text that every sequence draws. `refusal` is raised by the next submits,
    `failure` by streams after `fails_after` tokens. While `gate` is cleared streams stop before their
    `gate_after`-th token. `submitted` collects (model, prompt ids, params).
    """

    def __init__(self, tokenizer: Tokenizer, adapters: tuple[str, ...] = ("poet", "team/coder")) -> None:
        self.tokenizer = tokenizer
        self.tokenizers: dict[str, Tokenizer] = {}  # of models that have their own
        self.telemetry = Telemetry()
        self.model_name, self.model_root = "base", "/models/base"
        self.model_names: tuple[str, ...] = ("base",)
        self.max_model_len, self.vocab_size, self.created_s = 512, tokenizer.vocab_size, 1_700_000_000
        self.accounts = TenantAccounts(self.model_names, self.max_model_len)
        self.usage = UsageCounts()
        self.says: Callable[[str, str], str] = lambda model, prompt: f"{model} heard {prompt}"
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.fails_after = 1
        self.cached_tokens = 0
        self.max_waiting = 4096
        self.gate = asyncio.Event()
        self.gate.set()
        self.gate_after = 1
        self.gate_reached = asyncio.Event()
        self.submitted: list[tuple[str, tuple[int, ...], SamplingParams]] = []
        self.tenants: list[str] = []  # of each call that submitted
        self.priorities: list[int] = []
        self.salts: list[str] = []
        self.live: dict[str, FakeStream] = {}
        self.aborted: list[str] = []
        self.abort_seen = asyncio.Event()
        self.calls: list[str] = []
        self.drained_by: Callable[[], None] = lambda: None  # what lets the live requests end
        self.catalogue = FakeCatalogue(self)
        self._known = {name: AdapterEntry(name, Path("/adapters") / name, None) for name in adapters}
        self.steps: list[StepRecord] | None = []
        self._draining = False
        self.trouble: str | None = None

    def tokenizer_of(self, model: str) -> Tokenizer:
        return self.tokenizers.get(model, self.tokenizer)

    async def find(self, model: str) -> None:
        self.calls.append(f"find {model}")

    async def start(self) -> None:
        self.calls.append("start")

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        self.calls.append(f"drain {timeout_s:g}")
        self.drained_by()
        while self.live:
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.calls.append("close")

    async def submit_all(
        self, model: str, prompts: Mapping[str, tuple[int, ...]], params: SamplingParams, origin: Origin = NOWHERE
    ) -> tuple[FakeStream, ...]:  # fmt: skip
        if self._draining:
            raise Draining
        if self.refusal is not None:
            raise self.refusal
        if model not in self.model_names and model not in self._known:
            raise UnknownModel(model)
        if (count := len(prompts) * params.n) > self.max_waiting:
            raise TooManySequences(count, self.max_waiting)
        if max(map(len, prompts.values())) + (params.max_tokens or 1) > self.max_model_len:
            raise RequestRefused(f"This model's maximum context length is {self.max_model_len} tokens.")
        self.tenants.append(origin.tenant)
        self.priorities.append(origin.priority)
        self.salts.append(origin.cache_salt)
        return tuple(self._stream(model, prompt, params, name) for name, prompt in prompts.items())

    def _stream(
        self, model: str, prompt: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> FakeStream:
        assert request_id not in self.live, "request ids are unique among live requests"
        self.submitted.append((model, prompt, params))
        stream = FakeStream(self, request_id, self._deltas(model, prompt, params, request_id))
        stream.adapter_digest = "" if model in self.model_names else f"digest-of-{model}"
        self.live[request_id] = stream
        return stream

    async def load_adapter(
        self, name: str, folder: Path, replaces: bool = True, roots: AllowedRoots = ANYWHERE
    ) -> AdapterRef:
        if not replaces and name in self._known:
            raise AdapterExists(name)
        if not is_name(name) or name in self.model_names:
            raise InvalidAdapterName(name, "choose another")
        if not (folder / "adapter_config.json").exists():
            raise InvalidAdapter(f"adapter {name!r}: {folder.name} has no adapter_config.json")
        ref = AdapterRef(digest=name, name=name, rank=8, sites=("q_proj",), nbytes=1024)
        self._known[name] = AdapterEntry(name, folder, ref)
        return ref

    def add(self, name: str, folder: Path) -> None:
        """Know one more adapter."""
        self._known[name] = AdapterEntry(name, folder, None)

    async def unload_adapter(self, name: str) -> None:
        if self._known.pop(name, None) is None:
            raise UnknownModel(name)

    def adapters(self) -> tuple[AdapterEntry, ...]:
        return tuple(self._known.values())

    def may_serve(self, model: str) -> bool:
        return model in self.model_names or model in self._known

    def series(self) -> tuple[MetricSeries, ...]:
        return (self.telemetry.refusals.series(),)

    def recent_steps(self) -> list[StepRecord] | None:
        return self.steps

    def stats(self) -> Stats:
        return Stats(running=len(self.live), trouble=str(Draining()) if self._draining else self.trouble)

    async def _deltas(
        self, model: str, prompt: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> AsyncIterator[Delta]:
        """All sequences in turn, a token each."""
        tokens = self.tokenizer.encode(self.says(model, self.tokenizer.decode(prompt)), add_special=False)
        eos = self.tokenizer.encode(EOS, add_special=False)[0]
        texts = {index: Detokenizer(self.tokenizer, params) for index in range(params.n)}
        drawn = 0
        while texts:
            if drawn + 1 >= self.gate_after and not self.gate.is_set():
                self.gate_reached.set()
                await self._gate_opens(request_id)
            await asyncio.sleep(0)
            if request_id not in self.live:
                return
            for index, text in list(texts.items()):
                if self.failure is not None and drawn >= self.fails_after:
                    raise self.failure
                event = self._event(SequenceKey(request_id, index), drawn, (*tokens, eos), params)
                if drawn == 0 and params.prompt_logprobs is not None:
                    entries = tuple(scored(token, params.prompt_logprobs) for token in prompt[1:])
                    event = replace(event, prompt_logprobs=entries)
                yield text.push(event)
                if text.finished:
                    del texts[index]
            drawn += 1

    async def _gate_opens(self, request_id: str) -> None:
        """Wait for the gate, or for whoever reads a request to let go of it."""
        ends = [asyncio.ensure_future(each.wait()) for each in (self.gate, self.live[request_id].closed)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in ends:
                each.cancel()

    def _event(
        self, key: SequenceKey, place: int, tokens: tuple[int, ...], params: SamplingParams
    ) -> TokenEvent:
        token_id = tokens[min(place, len(tokens) - 1)]
        reason = None
        if place >= len(tokens) - 1 or token_id in params.stop_token_ids:
            reason = FinishReason.STOP
        elif params.max_tokens is not None and place + 1 >= params.max_tokens:
            reason = FinishReason.LENGTH
        logprob = scored(token_id, params.logprobs) if params.logprobs is not None else None
        return TokenEvent(key, token_id, logprob, reason, cached_tokens=self.cached_tokens)


def scored(token_id: int, top: int) -> TokenLogprob:
    """A made-up log-probability: the token is always the likeliest, ids after it follow."""
    others = tuple(((token_id + step) % 256, -0.5 * (step + 1)) for step in range(top))
    return TokenLogprob(token_id, -0.5, 1, others)
