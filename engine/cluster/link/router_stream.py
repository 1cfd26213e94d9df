"""Run one router's requests on this node, and send their tokens back in one message a step."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from engine.cluster.link.link_messages import (
    VERSION,
    Abort,
    FailureKind,
    Finish,
    FromNode,
    FromRouter,
    LinkError,
    NodeReady,
    OpenLink,
    RequestFailed,
    Submit,
    Tokens,
    TokenTold,
    encoded,
    read_from_router,
)
from engine.errors import AdapterFailed, EngineError, EngineStopped, NotInTime, StructureFailed
from engine.live.node_load import NodeJobs
from engine.live.step_loop import StepLoop
from engine.structured.grammar_pool import GrammarPool
from lora.adapter import AdapterRef
from lora.errors import AdapterRefused, UnknownAdapter
from scheduler.plan import SequenceKey, TokenEvent
from scheduler.request import InvalidParameter, Request

_MOST_FRAMES = 16_384  # that a router has not taken
Context = Any  # grpc.aio's context of bytes in and out is generic only to type checkers


def _kind(error: EngineError) -> FailureKind:
    match error:
        case NotInTime():
            return "late"
        case AdapterFailed():
            return "adapter"
        case EngineStopped():
            return "stopped"
        case StructureFailed():
            return "structure"
        case _:
            return "step"


class AdapterSource(Protocol):
    """Whoever makes an adapter known to this node's store."""

    async def learn(self, ref: AdapterRef) -> None:
        """Make `ref` known, so that a request may retain it. Raises AdapterRefused, NotInTime."""
        ...


class NodeWatcher(Protocol):
    """Whoever counts the work that the node takes in."""

    def took(self, ref: AdapterRef, tokens: int) -> None:
        """Count input or output tokens of an adapter, or of the base."""
        ...


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What a node is called, and what it serves; `weights` is the digest of the base model's."""

    name: str
    session: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weights: str


@dataclass(slots=True)
class LinkedNode:
    """What the streams of all routers share on a node."""

    identity: NodeIdentity
    step_loop: StepLoop
    jobs: NodeJobs
    adapters: AdapterSource
    watcher: NodeWatcher
    grammars: GrammarPool
    draining: bool = False


class RouterStream:
    """One router's requests here; a StepListener."""

    def __init__(self, name: str, node: LinkedNode) -> None:
        """Run requests of the router of that name on `node`."""
        self.name, self.heard = name, 0
        self._node, self._loop = node, node.step_loop
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_FRAMES)
        self._requests: dict[str, str] = {}  # request id by key
        self._keys: dict[str, str] = {}
        self._preparing: set[asyncio.Task[None]] = set()
        self._ended = False

    def send(self, message: FromNode) -> None:
        """Send a message after those that wait; a router that takes nothing is given up."""
        if self._ended:
            return
        try:
            self._frames.put_nowait(encoded(message))
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        """End the stream, and abort what runs for it."""
        if self._ended:
            return
        self._ended = True
        for task in self._preparing:
            task.cancel()
        for request_id in tuple(self._keys):
            self._loop.abort(request_id)
            self._forget(request_id)
        while self._frames.full():
            self._frames.get_nowait()
        self._frames.put_nowait(None)

    async def run(self, incoming: AsyncIterator[bytes], context: Context) -> None:
        """Do what the router says until either side ends."""
        who = self._node.identity
        ready = NodeReady(
            VERSION, who.name, who.session, who.max_model_len, who.vocab_size, who.eos_token_ids, who.weights
        )
        self.send(ready)
        reading = asyncio.create_task(self._read(incoming))
        try:
            while (frame := await self._frames.get()) is not None:
                await context.write(frame)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, incoming: AsyncIterator[bytes]) -> None:
        try:
            async for content in incoming:
                self._obey(read_from_router(content))
        finally:
            self.end()

    def _obey(self, message: FromRouter) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Finish(key=key, index=index):
                if (request_id := self._requests.get(key)) is not None:
                    self._loop.finish(SequenceKey(request_id, index))
                    if self._node.jobs.ended(request_id, index):
                        self._forget(request_id)
            case Abort(key=key):
                if (request_id := self._requests.get(key)) is not None:
                    self._loop.abort(request_id)
                    self._forget(request_id)
            case OpenLink():
                raise LinkError("OpenLink comes once, at the beginning")

    def _submit(self, asked: Submit) -> None:
        self.heard = max(self.heard, asked.number)
        if asked.key in self._requests:
            raise LinkError(f"key {asked.key!r} is live already")
        request_id = f"{self.name}/{asked.key}"
        now_s = time.monotonic()
        in_s = asked.first_token_in_s
        try:
            request = Request(
                request_id=request_id,
                prompt_token_ids=asked.prompt_token_ids,
                adapter=asked.ref,
                params=asked.params,
                eos_token_ids=asked.eos_token_ids,
                arrival_s=now_s,
                priority=asked.priority,
                first_token_by_s=None if in_s is None else now_s + in_s,
                drawn_token_ids=asked.drawn_token_ids,
                tenant=asked.tenant,
                stream=asked.stream,
                trace=asked.trace,
                cache_salt=asked.cache_salt,
            )
        except ValueError as error:
            self._refuse(asked.key, "request", str(error))
            return
        if self._node.draining or self._node.jobs.is_full(request.params.n):
            self._refuse(asked.key, "busy", "the node takes nothing more now")
            return
        self._requests[asked.key], self._keys[request_id] = request_id, asked.key
        self._node.jobs.begin(request)
        self._node.watcher.took(request.adapter, len(request.prompt_token_ids))
        if request.params.structured_outputs is None:
            self._run(request, learn=True)
        else:
            self._begin(self._compile(request))

    def _begin(self, preparation: Coroutine[None, None, None]) -> None:
        """Have something done before a request is queued."""
        task = asyncio.create_task(preparation)
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _compile(self, request: Request) -> None:
        """Queue a request with the grammar of the form that its text is to have."""
        try:
            grammar = await self._node.grammars.compile(request.params)
        except InvalidParameter as error:
            self._fail(request.request_id, "structure", str(error))
        except NotInTime as error:
            self._fail(request.request_id, "busy", str(error))
        else:
            if request.request_id in self._keys:
                self._run(replace(request, grammar=grammar), learn=True)

    def _run(self, request: Request, learn: bool) -> None:
        """Queue a request; one whose adapter is not known here waits until it is, once."""
        try:
            self._loop.submit(request, self)
            self._loop.wake()
        except UnknownAdapter as error:
            if not learn:
                self.fail(request.request_id, AdapterFailed(str(error)))
                return
            self._begin(self._learn(request))
        except ValueError as error:  # an InvalidParameter or a RequestRefused
            self._fail(request.request_id, "request", str(error))

    async def _learn(self, request: Request) -> None:
        try:
            await self._node.adapters.learn(request.adapter)
        except (AdapterRefused, EngineError) as error:
            self._fail(request.request_id, "adapter", str(error))
            return
        if request.request_id in self._keys:
            self._run(request, learn=False)

    def hear(self, events: Sequence[TokenEvent]) -> None:
        """Tell the router what a step drew for it."""
        told: list[TokenTold] = []
        for event in events:
            request_id, index = event.key.request_id, event.key.index
            key = self._keys.get(request_id)
            if key is None:
                continue
            told.append(
                TokenTold(
                    key, index, event.token_id, event.finish_reason, event.logprob, event.prompt_logprobs,
                    event.cached_tokens,
                )
            )  # fmt: skip
            if event.token_id is not None:
                self._node.watcher.took(self._node.jobs.drew(request_id, index), 1)
            if event.finish_reason is not None and self._node.jobs.ended(request_id, index):
                self._forget(request_id)
        if told:
            self.send(Tokens(tuple(told)))

    def fail(self, request_id: str, error: EngineError) -> None:
        """Tell the router that the engine gave a request up."""
        self._fail(request_id, _kind(error), str(error))

    def _fail(self, request_id: str, kind: FailureKind, reason: str) -> None:
        key = self._keys.get(request_id)
        if key is not None:
            self._forget(request_id)
            self._refuse(key, kind, reason)

    def _refuse(self, key: str, kind: FailureKind, reason: str) -> None:
        self.send(RequestFailed(key, kind, reason))

    def _forget(self, request_id: str) -> None:
        key = self._keys.pop(request_id, None)
        if key is not None:
            del self._requests[key]
        self._node.jobs.end(request_id)
