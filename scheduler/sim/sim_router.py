"""A simulated router: the real decisions, with connections to simulated nodes and clients.

It holds a client's request until it has ended. What an earlier attempt still says is not heard.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from scheduler.cluster.protocol.messages import RouterReport
from scheduler.cluster.routing.base import NodeLoad
from scheduler.cluster.routing.orders import Offer, Order, Refuse, Send
from scheduler.cluster.routing.prefix_index import prefix_chunks
from scheduler.cluster.routing.router import Router
from scheduler.cluster.state import RoutingTable
from scheduler.request import Request
from scheduler.sim.clock import Clock
from scheduler.sim.network import Network
from scheduler.sim.node import News, Progress, SimNode

Answer = Callable[[str, Progress], None]
RefuseClient = Callable[[str, Refuse], None]


class SimRouter:
    """Owner of the requests that came to one router.

    `answer` is called for each token and for the end of each request that is served, `refuse` for the others.
    """

    def __init__(
        self,
        name: str,
        router: Router,
        clock: Clock,
        network: Network,
        nodes: Mapping[str, SimNode],
        answer: Answer,
        refuse: RefuseClient,
        session: int = 0,
    ) -> None:
        self.name, self.up, self.router, self._session = name, True, router, session
        self._clock, self._network, self._nodes = clock, network, nodes
        self._answer, self._refuse = answer, refuse
        self._requests: dict[str, Request] = {}
        self._wake_s = float("inf")

    def take(self, request: Request) -> None:
        """Take a client's request in."""
        name = request.request_id
        self._requests[name] = request
        offer = Offer(
            request_id=name,
            adapter=request.adapter,
            prompt_tokens=len(request.prompt_token_ids),
            tenant=request.tenant,
            priority=request.priority,
            chunks=prefix_chunks(request.adapter.digest, request.prompt_token_ids, request.adapted_from),
        )
        self._do(self.router.offer(offer, self._clock.now))

    def has(self, name: str) -> bool:
        """Return whether the request is not answered."""
        return name in self.router

    def pending(self) -> list[str]:
        """Return the requests that are not answered."""
        return self.router.pending()

    def report(self) -> RouterReport:
        """Return what the coordinator is to know."""
        router = self.router
        return RouterReport(
            self.name, router.table.version, self._session, tuple(router.refused_tokens.items())
        )

    def adopt(self, table: RoutingTable) -> None:
        """Route by `table`, if it is newer."""
        if self.up:
            self.router.adopt(table)

    def hear_load(self, node: str, load: NodeLoad) -> None:
        """Take in what a node says of its load."""
        if self.up:
            self.router.hear(node, load, self._clock.now)
            self._advance()

    def lose(self, node: str) -> None:
        """Note that the connection to `node` broke."""
        if self.up:
            self.router.lose(node, self._clock.now)
            self._advance()

    def is_waiting_for(self, name: str, node: str, attempt: int) -> bool:
        """Return whether an answer to this attempt on `node` would be heard."""
        return self.up and self.router.is_waiting_for(name, node, attempt)

    def hear(self, node: str, news: Sequence[News]) -> None:
        """Take in what a node says of the requests that it was sent."""
        if not self.up:
            return
        for job, progress in news:
            name, attempt = job.rsplit("#", 1)
            self._hear(name, int(attempt), node, progress)
        self._advance()

    def _hear(self, name: str, attempt: int, node: str, progress: Progress) -> None:
        router = self.router
        if not router.is_waiting_for(name, node, attempt):
            return
        match progress:
            case Progress.TOKEN:
                router.drew(name, attempt)
                self._answer(name, progress)
            case Progress.DONE:
                router.ended(name, attempt)
                del self._requests[name]
                self._answer(name, progress)
            case Progress.REFUSED:
                router.refused(name, attempt, self._clock.now)

    def _advance(self) -> None:
        if self.router.waiting:
            self._do(self.router.advance(self._clock.now))

    def _do(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Send):
                self._send(order)
            else:
                del self._requests[order.request_id]
                self._refuse(order.request_id, order)
        self._sleep()

    def _sleep(self) -> None:
        """Wake when the router asks for it, if nothing is heard before."""
        wake_s = max(self.router.wake_s(), self._clock.now)
        if wake_s < self._wake_s:
            self._wake_s = wake_s
            self._clock.at(wake_s, self._wake)

    def _wake(self) -> None:
        if self._clock.now >= self._wake_s:
            self._wake_s = float("inf")
        if self.up:
            self._do(self.router.advance(self._clock.now))

    def _send(self, order: Send) -> None:
        name, node = order.request_id, self._nodes[order.node]
        drawn = (1,) * self.router.drawn_tokens(name)
        request = replace(self._requests[name], request_id=f"{name}#{order.attempt}", drawn_token_ids=drawn)

        def submit() -> None:
            if self.is_waiting_for(name, node.name, order.attempt):
                node.submit(request, self, order.number)

        def broken() -> None:
            if self.is_waiting_for(name, node.name, order.attempt):
                self.lose(node.name)

        self._network.call((self.name, node.name), lambda: node.up, submit, broken)
