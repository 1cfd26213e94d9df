"""The router's decisions: which requests are sent to which node, wait, move or are refused.

It takes requests in, holds each until it has ended, and answers each exactly once. What it returns are orders, for
whoever has connections. It knows no socket and no token: a request is its adapter, its lengths and who asks.

A request whose node is lost moves: another node is sent it with the tokens that were drawn, which it computes anew
as after a preemption. Such a stream goes before all that have not begun, and no SLO refuses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.routing.base import NodeLoad, RouteRequest, RoutingPolicy, fetch_s
from scheduler.cluster.routing.fair_queue import FairQueue, QueuedRequest
from scheduler.cluster.routing.load_view import LoadView
from scheduler.cluster.routing.orders import Offer, Order, RefusalReason, Refuse, Send
from scheduler.cluster.routing.prefix_index import PrefixIndex
from scheduler.cluster.routing.slo_admission import RetryTimes, SloAdmission
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """How long a router tries.

    A request is sent at most `attempts` times, and `moves` times more after a node was lost that had drawn new tokens
    for it: a request that goes on losing nodes may be what ends them. What no node is reachable for waits at most
    `patience_s`; what a node refused is sent again after `pause_s`. One call looks at `most_tries` that wait.
    """

    attempts: int = 8
    moves: int = 24
    patience_s: float = 30.0
    pause_s: float = 0.3
    most_tries: int = 64
    node_chunks: int = 1024


@dataclass(slots=True)
class _Pending:
    """A request that has not ended: its node, if it is at one, and how many tokens it drew.

    Without a node it waits in the queue, or to be sent again at `due_s` because of what happened at `since_s`.
    """

    offer: Offer
    arrived_s: float
    expires_s: float = float("inf")
    work_s: float = 0.0
    attempt: int = 0
    node: str | None = None
    drawn_tokens: int = 0
    sent_drawn_tokens: int = 0  # of these, what it began the attempt with
    moves: int = 0  # attempts that do not count
    since_s: float = 0.0
    due_s: float = 0.0


class Router:
    """Owner of the requests that came to one router. Without `admission` all are sent at once, as by a router that
    has no notion of time."""

    def __init__(
        self,
        policy: RoutingPolicy,
        admission: SloAdmission | None,
        view: LoadView,
        rng: np.random.Generator,
        options: RouterOptions | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.table = EMPTY_TABLE
        self.refused_tokens: dict[AdapterRef, int] = {}  # prompt tokens by adapter, of all that was refused
        self._policy, self._admission, self._view, self._rng = policy, admission, view, rng
        self._options = options or RouterOptions()
        self._queue = FairQueue(weights)
        self._retry = RetryTimes(rng)
        self._prefixes = PrefixIndex(self._options.node_chunks)
        self._now = 0.0
        self._pending: dict[str, _Pending] = {}
        self._resend: dict[str, None] = {}  # those that are to be sent again, and are not queued

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._pending

    @property
    def waiting(self) -> int:
        """Count the requests that are at no node."""
        return len(self._queue) + len(self._resend)

    def pending(self) -> list[str]:
        """Return the requests that have not ended."""
        return list(self._pending)

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Let tenants have turns by these weights from now on; others weigh 1."""
        self._queue.weigh(weights)

    def adopt(self, table: RoutingTable) -> None:
        """Route by `table` from now on, unless it is older than the one in use."""
        if table.version > self.table.version:
            self.table = table

    def heard(self, node: str) -> NodeLoad | None:
        """Return what a node last said of its load, if it is connected and has said it."""
        return self._view.heard(node)

    def hear(self, node: str, load: NodeLoad, now: float) -> None:
        """Take in what a node says of its load."""
        self._view.hear(node, load, now)

    def offer(self, offer: Offer, now: float) -> list[Order]:
        """Take a client's request in; it is sent, queued or refused."""
        pending = self._pending[offer.request_id] = _Pending(offer, now)
        if self._admission is None:
            self._send_later(offer.request_id, now, now)
            return self.advance(now)
        ask = self._ask(pending)
        pending.work_s = self._admission.work_s(ask)
        pending.expires_s = self._admission.expires_s(ask, now)
        queued = QueuedRequest(
            request_id=offer.request_id,
            tenant=offer.tenant,
            adapter=offer.adapter.digest,
            work_s=pending.work_s,
            expires_s=pending.expires_s,
            priority=offer.priority,
        )
        wait_s = self._admission.wait_s(self._queue.work_before_s(queued), now) if len(self._queue) else 0.0
        if now + wait_s > pending.expires_s:
            return [self._refuse(offer.request_id, RefusalReason.OVERLOADED, now)]
        self._queue.add(queued)
        return self.advance(now)

    def advance(self, now: float) -> list[Order]:
        """Send what can be sent now, and refuse what is too late. Call it whenever something was heard, and at
        `wake_s`."""
        self._now = now
        self._view.expire(now)
        orders: list[Order] = []
        for request_id in list(self._resend):
            is_due = self._pending[request_id].due_s <= now
            if is_due and (order := self._send_again(request_id, now)) is not None:
                orders.append(order)
        reason = RefusalReason.OVERLOADED if self._view.loads else RefusalReason.NO_NODE
        orders += [self._refuse(each.request_id, reason, now) for each in self._queue.expired(now)]

        def send(queued: QueuedRequest) -> bool:
            order = self._send_in_time(queued.request_id, now)
            if order is not None:
                orders.append(order)
            return order is not None

        if len(self._queue) and self._view.loads:
            self._queue.serve(send, self._options.most_tries)
        return orders

    def wake_s(self) -> float:
        """Return when `advance` is to be called even if nothing is heard; infinity if nothing waits."""
        again = (self._pending[request_id] for request_id in self._resend)
        due = (self._due_s(each) for each in again)
        return min(self._queue.next_expiry_s, min(due, default=float("inf")))

    def drew(self, request_id: str, attempt: int, tokens: int = 1) -> bool:
        """Note that an attempt drew tokens; False if it is not the one that is listened to."""
        pending = self._current(request_id, attempt)
        if pending is None:
            return False
        pending.drawn_tokens += tokens
        return True

    def ended(self, request_id: str, attempt: int) -> bool:
        """Note that an attempt has answered in full; False if it is not the one that is listened to."""
        if self._current(request_id, attempt) is None:
            return False
        self.cancel(request_id)
        return True

    def refused(self, request_id: str, attempt: int, now: float) -> None:
        """Note that a node gave an attempt back: it is sent again after a pause, if still in time."""
        if self._current(request_id, attempt) is not None:
            self._send_later(request_id, now, now + self._options.pause_s)

    def lose(self, node: str, now: float) -> None:
        """Note that the connection to `node` broke: what was there moves."""
        self._view.lose(node)
        self._prefixes.lose(node)
        for request_id, pending in self._pending.items():
            if pending.node == node:
                pending.expires_s = float("inf")  # it was accepted
                pending.moves += pending.drawn_tokens > pending.sent_drawn_tokens
                self._send_later(request_id, now, now)

    def is_waiting_for(self, request_id: str, node: str, attempt: int) -> bool:
        """Return whether this attempt on `node` is the one that is listened to."""
        pending = self._current(request_id, attempt)
        return pending is not None and pending.node == node

    def cancel(self, request_id: str) -> None:
        """Forget a request, which has ended or which its client has given up."""
        self._pending.pop(request_id, None)
        self._resend.pop(request_id, None)
        self._queue.remove(request_id)

    def drawn_tokens(self, request_id: str) -> int:
        """Return how many tokens of the answer have been heard of."""
        return self._pending[request_id].drawn_tokens

    def _current(self, request_id: str, attempt: int) -> _Pending | None:
        pending = self._pending.get(request_id)
        if pending is None or pending.attempt != attempt or pending.node is None:
            return None
        return pending

    def _ask(self, pending: _Pending, left_s: float = float("inf")) -> RouteRequest:
        offer = pending.offer
        return RouteRequest(
            adapter=offer.adapter,
            prompt_tokens=offer.prompt_tokens + pending.drawn_tokens,
            cached_tokens=self._prefixes.cached_tokens(offer.chunks),
            first_token_in_s=left_s,
        )

    def _send_later(self, request_id: str, now: float, due_s: float) -> None:
        pending = self._pending[request_id]
        pending.node, pending.since_s, pending.due_s = None, now, due_s
        self._resend[request_id] = None

    def _due_s(self, pending: _Pending) -> float:
        """Return when something is to be decided about a request that came back, if nothing is heard before."""
        return pending.due_s if pending.due_s > self._now else self._given_up_s(pending)

    def _given_up_s(self, pending: _Pending) -> float:
        """Return when a request that came back is refused, unless it can be sent before."""
        patience_s = float("inf") if self._view.loads else self._options.patience_s
        return min(pending.expires_s, pending.since_s + patience_s)

    def _send_in_time(self, request_id: str, now: float) -> Send | None:
        """Send a request to the node of the policy's choice, if it would be in time there."""
        pending, admission = self._pending[request_id], self._admission
        assert admission is not None
        ask = self._ask(pending, admission.left_s(pending.arrived_s, now))
        node = self._policy.route(ask, self.table, self._view.loads, self._rng)
        load = self._view.loads[node]
        fetch_s = self._fetch_s(ask.adapter, node, load)
        if fetch_s is None or not admission.is_in_time(ask, node, load, fetch_s):
            return None
        return self._send(request_id, pending, ask, node, now)

    def _send_again(self, request_id: str, now: float) -> Order | None:
        """Send a request that came back; None while no node can be reached, or is in time for one not begun."""
        pending, options = self._pending[request_id], self._options
        if pending.attempt - min(pending.moves, options.moves) >= options.attempts:
            return self._refuse(request_id, RefusalReason.FAILED, now)
        if now >= self._given_up_s(pending):
            reason = RefusalReason.OVERLOADED if self._view.loads else RefusalReason.NO_NODE
            return self._refuse(request_id, reason, now)
        if not self._view.loads:
            return None
        if pending.expires_s == float("inf"):
            ask = self._ask(pending)
            node = self._policy.route(ask, self.table, self._view.loads, self._rng)
            order: Order | None = self._send(request_id, pending, ask, node, now)
        else:
            order = self._send_in_time(request_id, now)
        if order is not None:
            del self._resend[request_id]
        return order

    def _send(self, request_id: str, pending: _Pending, ask: RouteRequest, node: str, now: float) -> Send:
        pending.attempt += 1
        pending.node, pending.sent_drawn_tokens = node, pending.drawn_tokens
        number = self._view.sent(node, ask)
        self._prefixes.sent(node, pending.offer.chunks)
        if self._admission is not None:
            self._admission.sent(pending.work_s, now)
        return Send(request_id, pending.attempt, node, number)

    def _refuse(self, request_id: str, reason: RefusalReason, now: float) -> Refuse:
        offer = self._pending[request_id].offer
        self.refused_tokens[offer.adapter] = self.refused_tokens.get(offer.adapter, 0) + offer.prompt_tokens
        self.cancel(request_id)
        return Refuse(request_id, reason, self._retry.after_s(now))

    def _fetch_s(self, adapter: AdapterRef, node: str, load: NodeLoad) -> float | None:
        """Return how long the adapter's bytes take to come to `node`, as far as is known; None if they could not stay.

        To fetch what has no room would take away what others ask for, to be fetched again in turn.
        """
        planned = any(share.node == node for share in self.table.shares.get(adapter, ()))
        if planned or adapter.digest in load.adapters:
            return 0.0
        return fetch_s(adapter.nbytes) if load.has_room(adapter) else None
