"""One router's view of the nodes' loads: what they last said, and what it has sent them since."""

from types import MappingProxyType

from scheduler.cluster.routing.base import Loads, NodeLoad, RouteRequest


class _Node:
    """What is known of one node. `sent` are requests, by number, that its last load does not contain."""

    __slots__ = ("heard_s", "load", "number", "said", "sent")

    def __init__(self) -> None:
        self.said: NodeLoad | None = None
        self.load: NodeLoad | None = None
        self.heard_s = float("-inf")
        self.number = 0
        self.sent: dict[int, RouteRequest] = {}


class LoadView:
    """Owner of beliefs about loads.

    As clients come to all `routers` alike, each other one is taken to have sent as much as this. A node that has
    not spoken for `stale_s` counts as one that can take nothing: it is left out, as one that drains is.
    """

    def __init__(self, routers: int = 1, stale_s: float = 1.5) -> None:
        self._routers, self._stale_s = routers, stale_s
        self._nodes: dict[str, _Node] = {}
        self._loads: dict[str, NodeLoad] = {}

    def hear(self, node: str, load: NodeLoad, now: float) -> None:
        """Take in what a node says; what came late and is older than what it said before is not heard."""
        known = self._nodes.setdefault(node, _Node())
        if known.said is not None and load.number <= known.said.number:
            return
        known.said, known.heard_s = load, now
        known.sent = {number: ask for number, ask in known.sent.items() if number > load.heard}
        for ask in known.sent.values():
            load = load.plus(ask, self._routers)
        self._show(node, known, load)

    def heard(self, node: str) -> NodeLoad | None:
        """Return what a node last said, if its connection has not broken since."""
        return known.said if (known := self._nodes.get(node)) is not None else None

    def lose(self, node: str) -> None:
        """Forget the load of a node whose connection broke, until it speaks again."""
        if known := self._nodes.get(node):
            known.said = known.load = None
            known.sent = {}
            self._loads.pop(node, None)

    def sent(self, node: str, ask: RouteRequest) -> int:
        """Note that this router sends `ask` to `node`; return the request's number among those sent there."""
        known = self._nodes.setdefault(node, _Node())
        known.number += 1
        known.sent[known.number] = ask
        if known.load is not None:
            self._show(node, known, known.load.plus(ask, self._routers))
        return known.number

    @property
    def loads(self) -> Loads:
        """The loads of the nodes that may be sent to; a view, which changes."""
        return MappingProxyType(self._loads)

    def expire(self, now: float) -> None:
        """Leave out the nodes that have been silent for too long by `now`."""
        for node in [each for each in self._loads if now - self._nodes[each].heard_s > self._stale_s]:
            del self._loads[node]

    def _show(self, node: str, known: _Node, load: NodeLoad) -> None:
        known.load = load
        if load.draining:
            self._loads.pop(node, None)
        else:
            self._loads[node] = load
