"""Carry out a router's decisions: send requests to nodes, move those whose node is lost, and pass tokens on.

A request of several sequences runs on one node. If that is lost, each that has not ended moves as a request of its
own: it draws by the same seed and stream, and begins with the tokens that it has.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.cluster.link.link_messages import (
    Abort,
    Finish,
    LinkError,
    LoadTold,
    NodeReady,
    OpenLink,
    RequestFailed,
    Submit,
    Tokens,
    TokenTold,
)
from engine.cluster.link.node_connection import NodeConnection
from engine.cluster.router.forwarding_account import ForwardingCounts, ForwardingSpans
from engine.cluster.view import Member, ServedModel
from engine.errors import AdapterFailed, EngineError, NotAdmitted, NotInTime, StepFailed, StructureFailed
from engine.live.live_outputs import LiveOutputs
from scheduler.cluster.routing.orders import Offer, Order, RefusalReason, Refuse, Send
from scheduler.cluster.routing.router import Router
from scheduler.plan import SequenceKey, TokenEvent
from scheduler.request import Request
from transport.control.security import Security

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Flight:
    """A request that was offered: where it is, and what each of its sequences has drawn.

    `keys` are what the node calls it now: one for all sequences, or one for each that has moved.
    """

    request: Request
    node: str | None = None
    attempt: int = 0
    keys: dict[str, int | None] = field(default_factory=dict[str, int | None])
    drawn: list[list[int]] = field(default_factory=list[list[int]])
    failure: EngineError | None = None  # what a node last gave it up for
    moves: bool = False  # the node that it was on is lost, and no other has been sent it yet


class Forwarding:
    """Owner of the links and of the requests that are on them; a LinkListener. Used on one event loop."""

    def __init__(self, router: Router, hello: OpenLink, security: Security, model: ServedModel) -> None:
        """Link to nobody yet. Nodes that serve another model are not sent to."""
        self.counts, self.spans = ForwardingCounts(), ForwardingSpans()
        self.outputs: LiveOutputs | None = None  # who is told of tokens; set before anything is offered
        self.router = router
        self.ready: dict[str, NodeReady] = {}  # the nodes that are connected
        self._hello, self._security, self._model = hello, security, model
        self._connections: dict[str, NodeConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._flights: dict[str, _Flight] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._flights)

    def follow(self, members: Mapping[str, Member]) -> None:
        """Link to these members; links to others, or to earlier starts of these, are closed."""
        for name, connection in tuple(self._connections.items()):
            if members.get(name) != connection.member:
                del self._connections[name]
                task = asyncio.create_task(connection.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        for name, member in members.items():
            if name not in self._connections:
                connection = self._connections[name] = NodeConnection(
                    member, self._hello, self._security, self
                )
                connection.start()

    def offer(self, request: Request, offer: Offer) -> None:
        """Take a request in; its output is told of tokens, or of a refusal."""
        self._flights[offer.request_id] = _Flight(request, drawn=[[] for _ in range(request.params.n)])
        self._do(self.router.offer(offer, time.monotonic()))

    def finish(self, key: SequenceKey) -> None:
        """End one sequence, whose text is complete."""
        flight = self._flights.get(key.request_id)
        if flight is None or flight.node is None:
            return
        for name, index in flight.keys.items():
            if index is None:
                self._send(flight.node, Finish(name, key.index))
            elif index == key.index:
                self._send(flight.node, Abort(name))

    def abort(self, request_id: str) -> None:
        """End a request that nobody waits for; unknown ids are fine."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        self.spans.ended(request_id, "abort")
        if flight.node is not None:
            for name in flight.keys:
                self._send(flight.node, Abort(name))
        self.router.cancel(request_id)
        self._advance()

    async def close(self) -> None:
        """Close all links."""
        if self._timer is not None:
            self._timer.cancel()
        connections, self._connections = tuple(self._connections.values()), {}
        await asyncio.gather(*(each.close() for each in connections), *self._closing, return_exceptions=True)

    def connected(self, node: str, ready: NodeReady) -> None:
        """Note that a node can be sent to. Raises LinkError if it serves something else."""
        if ready.weights != self._model.weights or ready.vocab_size != self._model.vocab_size:
            raise LinkError(f"{node} serves another base model than this router: give both the same --model")
        self.ready[node] = ready

    def told(self, node: str, message: LoadTold | Tokens | RequestFailed) -> None:
        """Take in what a node says."""
        match message:
            case LoadTold(load=load):
                self.router.hear(node, load, time.monotonic())
            case Tokens(events=events):
                self._hear(node, events)
            case RequestFailed():
                self._failed(node, message)
        self._advance()

    def lost(self, node: str) -> None:
        """Move what was on a node whose connection broke."""
        self.ready.pop(node, None)
        here = [request_id for request_id, flight in self._flights.items() if flight.node == node]
        if here:
            _log.warning("node %s is lost: %d requests move", node, len(here))
        for request_id in here:
            self._flights[request_id].node, self._flights[request_id].moves = None, True
            self.spans.left(request_id, "lost")
        self.router.lose(node, time.monotonic())
        self._advance()

    def advance(self) -> None:
        """Decide anew: a table or a member has changed."""
        self._advance()

    def _advance(self) -> None:
        if self.router.waiting:
            self._do(self.router.advance(time.monotonic()))

    def _do(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Send):
                self._send_request(order)
            else:
                self._refuse(order)
        self._sleep()

    def _sleep(self) -> None:
        """Wake when the router asks for it, if nothing is heard before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_s = self.router.wake_s() - time.monotonic()
        if wake_s < float("inf"):
            self._timer = asyncio.get_running_loop().call_later(max(0.001, wake_s), self._advance)

    def _send_request(self, order: Send) -> None:
        flight, outputs = self._flights[order.request_id], self.outputs
        assert outputs is not None, "set before anything is offered"
        flight.node, flight.attempt, flight.keys = order.node, order.attempt, {}
        self.counts.sent_to[order.node] += 1
        key, trace = f"{order.request_id}#{order.attempt}", self.spans.sent(flight.request, order.node)
        if not any(flight.drawn):
            submits = [self._submit(replace(flight.request, trace=trace), key, order.number, (), 0)]
            flight.keys[key] = None
        else:
            submits: list[Submit] = []
            alone = replace(flight.request, params=replace(flight.request.params, n=1), trace=trace)
            for index in outputs.running(order.request_id):
                name = f"{key}.{index}"
                drawn = tuple(flight.drawn[index])
                submits.append(self._submit(alone, name, order.number, drawn, index))
                flight.keys[name] = index
        self.counts.moved += flight.moves
        self.counts.streams_moved += flight.moves * len(flight.keys if any(flight.drawn) else flight.drawn)
        flight.moves = False
        for submit in submits:
            if not self._send(order.node, submit):
                asyncio.get_running_loop().call_soon(self.lost, order.node)
                return

    def _submit(self, request: Request, key: str, number: int, drawn: tuple[int, ...], stream: int) -> Submit:
        by_s = request.first_token_by_s
        return Submit(
            key=key,
            number=number,
            adapter=None if request.adapter.is_base else request.adapter,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            eos_token_ids=request.eos_token_ids,
            priority=request.priority,
            tenant=request.tenant,
            first_token_in_s=None if by_s is None or drawn else max(0.0, by_s - time.monotonic()),
            drawn_token_ids=drawn,
            stream=stream,
            trace=request.trace,
            cache_salt=request.cache_salt,
        )

    def _send(self, node: str, message: Submit | Finish | Abort) -> bool:
        connection = self._connections.get(node)
        return connection is not None and connection.send(message)

    def _refuse(self, order: Refuse) -> None:
        flight, outputs = self._flights.pop(order.request_id), self.outputs
        self.spans.ended(order.request_id, order.reason.value)
        self.counts.refused[order.reason.value] = self.counts.refused.get(order.reason.value, 0) + 1
        retry_s = max(1, round(order.retry_after_s))
        match order.reason:
            case RefusalReason.OVERLOADED:
                error: EngineError = NotAdmitted(retry_s)
            case RefusalReason.NO_NODE:
                error = NotInTime("no node can be reached", retry_s)
            case RefusalReason.FAILED:
                error = flight.failure or NotInTime(
                    "every node that was asked gave the request back", retry_s
                )
        if outputs is not None:
            outputs.fail(order.request_id, error)

    def _flight_of(self, node: str, key: str) -> tuple[str, _Flight] | None:
        """Return the request that a node calls `key`, if that is where it is listened to."""
        request_id = key.rpartition("#")[0]
        flight = self._flights.get(request_id)
        known = flight is not None and flight.node == node and key in flight.keys
        return (request_id, flight) if flight is not None and known else None

    def _hear(self, node: str, told: Sequence[TokenTold]) -> None:
        events: list[TokenEvent] = []
        for each in told:
            found = self._flight_of(node, each.key)
            if found is None:
                continue
            request_id, flight = found
            moved = flight.keys[each.key]
            index = each.index if moved is None else moved
            if index >= len(flight.drawn):
                continue
            if each.token_id is not None:
                flight.drawn[index].append(each.token_id)
                self.router.drew(request_id, flight.attempt)
            events.append(
                TokenEvent(
                    SequenceKey(request_id, index), each.token_id, each.logprob, each.finish_reason,
                    each.prompt_logprobs, each.cached_tokens,
                )
            )  # fmt: skip
        if self.outputs is None:
            return
        self.outputs.hear(events)
        for request_id in {event.key.request_id for event in events}:
            flight = self._flights.get(request_id)
            if flight is not None and not self.outputs.running(request_id):
                del self._flights[request_id]
                self.spans.ended(request_id, "done")
                self.router.ended(request_id, flight.attempt)

    def _failed(self, node: str, failed: RequestFailed) -> None:
        found = self._flight_of(node, failed.key)
        if found is None:
            return
        request_id, flight = found
        match failed.kind:
            case "stopped":
                self.lost(node)
            case "busy" | "late" | "adapter":
                if failed.kind == "adapter":
                    flight.failure = AdapterFailed(failed.reason)
                for name in flight.keys:
                    if name != failed.key:
                        self._send(node, Abort(name))
                flight.node = None
                self.spans.left(request_id, failed.kind)
                self.router.refused(request_id, flight.attempt, time.monotonic())
            case "request" | "step" | "structure":
                self.spans.ended(request_id, failed.kind)
                self.abort(request_id)
                error = StructureFailed() if failed.kind == "structure" else StepFailed(failed.reason, True)
                if self.outputs is not None:
                    self.outputs.fail(request_id, error)
