"""A front door: takes requests in, sends each to a node by its routing table, and answers each exactly once.

It holds a request until it is answered. If the connection to the node breaks, or the node refuses, the
request goes to a node again, as another attempt; what an earlier attempt still says is not heard.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from scheduler.cluster.routing.base import Loads, NoNodeReachable, Outlook, RouteRequest, RoutingPolicy
from scheduler.request import Request
from scheduler.sim.clock import Clock
from scheduler.sim.network import Network
from scheduler.sim.node import Progress, SimNode

Answer = Callable[[str, Progress], None]


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a request is sent before it is refused, and how long after a refusal it is sent again."""

    attempts: int = 8
    pause_s: float = 0.5


@dataclass(slots=True)
class _Pending:
    request: Request
    attempt: int = 0
    node: str = ""


class Outbound:
    """What all front doors share: the network, the nodes by name, and what nodes last said of their load."""

    def __init__(self, clock: Clock, network: Network, nodes: Mapping[str, SimNode]) -> None:
        self.clock, self.network, self.nodes = clock, network, nodes
        self.loads: Loads = {}


class FrontDoor:
    """The front door of `home`, which is where its table comes from.

    `answer` is called for each token-bearing progress and for the end of each request.
    """

    def __init__(
        self,
        home: SimNode,
        outbound: Outbound,
        policy: RoutingPolicy,
        rng: np.random.Generator,
        answer: Answer,
    ) -> None:
        self._home, self._outbound, self._policy, self._rng, self._answer = (
            home,
            outbound,
            policy,
            rng,
            answer,
        )
        self._patience, self._outlook = Patience(), Outlook()
        self._pending: dict[str, _Pending] = {}

    def take(self, request: Request) -> None:
        """Take a client's request in."""
        self._pending[request.request_id] = _Pending(request)
        self._send(request.request_id)

    def pending(self) -> list[str]:
        """Return the requests that are not answered."""
        return list(self._pending)

    def has(self, name: str) -> bool:
        """Return whether the request is not answered."""
        return name in self._pending

    def broke(self, node: str) -> None:
        """Send what was sent to `node` elsewhere, once it is known that the connection broke."""
        for name, pending in list(self._pending.items()):
            if pending.node == node:
                self._again_after(self._outbound.network.times.detect_s, name, pending.attempt)

    def is_waiting(self, request_id: str, node: str, attempt: int) -> bool:
        """Return whether an answer to this attempt on `node` would be heard."""
        pending = self._pending.get(request_id)
        return self._home.up and pending is not None and (pending.node, pending.attempt) == (node, attempt)

    def _send(self, name: str) -> None:
        """Make the next attempt, or refuse if there were enough."""
        pending = self._pending[name]
        pending.attempt += 1
        if pending.attempt > self._patience.attempts:
            self._end(name, Progress.REFUSED)
            return
        request, outbound, outlook = pending.request, self._outbound, self._outlook
        outlook.hear(outbound.loads)
        loads = outlook.reachable(partial(outbound.network.reaches, self._home.name))
        try:
            ask = RouteRequest(request.adapter, len(request.prompt_token_ids))
            pending.node = self._policy.route(ask, self._home.agent.table, loads, self._rng)
        except NoNodeReachable:
            self._again_after(self._patience.pause_s, name, pending.attempt)
            return
        outlook.sent(pending.node, ask)
        self._call(name, pending.attempt, outbound.nodes[pending.node])

    def _call(self, name: str, attempt: int, node: SimNode) -> None:
        request = replace(self._pending[name].request, request_id=f"{name}#{attempt}")
        home, network = self._home, self._outbound.network

        def tell(progress: Progress) -> None:
            network.call(
                (node.name, home.name),
                lambda: self.is_waiting(name, node.name, attempt),
                lambda: self._hear(name, progress),
                lambda: None,
            )

        def submit() -> None:
            if self.is_waiting(name, node.name, attempt):
                node.submit(request, tell)

        broken = self._again(name, attempt)
        network.call((home.name, node.name), lambda: node.up, submit, broken)

    def _hear(self, name: str, progress: Progress) -> None:
        if progress is Progress.REFUSED:
            self._again_after(self._patience.pause_s, name, self._pending[name].attempt)
        elif progress is Progress.DONE:
            self._end(name, progress)
        else:
            self._answer(name, progress)

    def _end(self, name: str, progress: Progress) -> None:
        del self._pending[name]
        self._answer(name, progress)

    def _again(self, name: str, attempt: int) -> Callable[[], None]:
        def again() -> None:
            pending = self._pending.get(name)
            if self._home.up and pending is not None and pending.attempt == attempt:
                self._send(name)

        return again

    def _again_after(self, delay_s: float, name: str, attempt: int) -> None:
        self._outbound.clock.after(delay_s, self._again(name, attempt))
