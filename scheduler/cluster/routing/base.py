"""What every routing policy offers: what a front door knows when a request comes, and how it answers.

A front door knows the routing table and what nodes last said of their load; it may be wrong about both, and a
node takes what it is sent. Chance is an argument.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import AdapterLoad, Kernel, StepLoad
from scheduler.cluster.cost.pace import AS_PROFILED, Pace
from scheduler.cluster.state import RoutingTable, Shares, normalised


class NoNodeReachable(RuntimeError):
    """There is no node to send a request to; the remedy is to wait for one, or to start one."""

    def __init__(self, adapter: AdapterRef) -> None:
        super().__init__(f"adapter={adapter.name!r}: no node is reachable; retry, or start a node")


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A request to be routed. `cached_tokens` is how much of the prompt each node is believed to have in its
    prefix cache; nodes not named have none."""

    adapter: AdapterRef
    prompt_tokens: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What a node last said: requests on it, and in `work` its queued prompt tokens and decoding sequences by
    adapter.

    `work` has the K/V tokens they read too; `adapters` are the digests of these adapters. `room_bytes` is
    memory that is neither kept for the plan nor needed by requests on it; endless where a node does not say.
    `kernel` and `pace` are how its steps turned out to cost; None is the profile's kernel.
    """

    requests: int
    work: StepLoad
    adapters: frozenset[str] = frozenset()
    room_bytes: float = float("inf")
    kernel: Kernel | None = None
    pace: Pace = AS_PROFILED

    def has_room(self, adapter: AdapterRef, front_doors: int = 1) -> bool:
        """Return whether a request for `adapter`, which the plan does not keep here, need not wait for
        memory.

        Each of `front_doors` may send one like it, since they do not hear of each other. Without any room
        those that use it already may be waiting themselves.
        """
        return self.room_bytes > (0 if adapter.digest in self.adapters else adapter.nbytes * front_doors)

    def plus(self, ask: RouteRequest, times: int) -> "NodeLoad":
        """Return the load with `times` as many requests like `ask` on it.

        One for an adapter already there adds tokens and no rank. Any other is taken to need room, since this
        does not know what is kept there.
        """
        is_there = ask.adapter.digest in self.adapters
        more = AdapterLoad(0 if is_there else ask.adapter.rank, ask.prompt_tokens * times, 0)
        return replace(
            self,
            requests=self.requests + times,
            work=replace(self.work, adapters=(*self.work.adapters, more)),
            adapters=self.adapters | {ask.adapter.digest},
            room_bytes=self.room_bytes - (0 if is_there else ask.adapter.nbytes * times),
        )


Loads = Mapping[str, NodeLoad]  # of the nodes that can be reached


class Outlook:
    """One front door's view of loads: what nodes last said, and what it has sent since.

    As clients come to all front doors alike, it takes each other one to have sent as much. Nothing here costs
    more where there are more nodes.
    """

    def __init__(self) -> None:
        self._said: Loads = {}
        self._since: dict[str, NodeLoad] = {}

    def hear(self, said: Loads) -> None:
        """Take in what nodes said: `said` is a new mapping, and what was sent before is in it."""
        if said is not self._said:
            self._said, self._since = said, {}

    def of(self, node: str) -> NodeLoad:
        """Return the load of a node that has spoken."""
        return self._since.get(node) or self._said[node]

    def reachable(self, reaches: Callable[[str], bool]) -> Loads:
        """Return the nodes that have spoken and that `reaches` says can be reached.

        Each is looked at when it is asked for, so that a policy pays for the nodes that it considers.
        """
        return _Reachable(self, self._said, reaches)

    def sent(self, node: str, ask: RouteRequest) -> None:
        """Note that this front door sent `ask` to `node`."""
        self._since[node] = self.of(node).plus(ask, times=len(self._said))


class _Reachable(Mapping[str, NodeLoad]):
    def __init__(self, outlook: Outlook, said: Loads, reaches: Callable[[str], bool]) -> None:
        self._outlook, self._said, self._reaches = outlook, said, reaches

    def __getitem__(self, node: str) -> NodeLoad:
        if node not in self:
            raise KeyError(node)
        return self._outlook.of(node)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, str) and node in self._said and self._reaches(node)

    def __iter__(self) -> Iterator[str]:
        return (node for node in self._said if self._reaches(node))

    def __len__(self) -> int:
        return sum(map(self._reaches, self._said))

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None


class RoutingPolicy(Protocol):
    """Chooses the node that runs a request, among those of `loads`."""

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Return a node's name; raises NoNodeReachable if `loads` is empty."""
        ...


def reachable_shares(ask: RouteRequest, table: RoutingTable, loads: Loads) -> Shares:
    """Return the adapter's shares on reachable nodes, summing to 1; all reachable nodes alike if it has none
    there."""
    if not loads:
        raise NoNodeReachable(ask.adapter)
    planned = normalised((s.node, s.part) for s in table.shares.get(ask.adapter, ()) if s.node in loads)
    return planned or normalised((node, 1.0) for node in loads)


def drawn(shares: Shares, rng: np.random.Generator) -> str:
    """Draw a node with the probability of its part."""
    bounds = list(accumulate(share.part for share in shares))
    return shares[min(bisect_right(bounds, rng.random()), len(shares) - 1)].node
