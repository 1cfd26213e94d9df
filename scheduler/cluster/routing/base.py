"""What every routing policy offers: what a router knows when a request comes, and how it answers.

A router knows the routing table and what nodes last said of their load; it may be wrong about both, and a
node takes what it is sent. Chance is an argument.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    prefix cache; nodes not named have none. Its first token is wanted in `first_token_in_s`."""

    adapter: AdapterRef
    prompt_tokens: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    first_token_in_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What a node last said: requests on it, and in `work` its queued prompt tokens and decoding sequences by
    adapter.

    `work` has the K/V tokens they read too; `adapters` are the digests of these adapters. `room_bytes` is
    memory that is neither kept for the plan nor needed by requests on it; endless where a node does not say.
    `number` counts what the node says, over its restarts too. `heard` is the last request of the receiver's that
    is in it. A node that is `draining` takes no more. Where `step_rows` is given a step reads no more
    prompt tokens than that. So many sequences as there are `seats` run at once, with K/V of `kv_tokens` tokens.
    `waiting` sequences wait to run, and K/V of `kv_used_tokens` is in use: both are told for operators alone.
    `kernel` and `pace` are how its steps turned out to cost; None is the profile's kernel.
    """

    requests: int
    work: StepLoad
    adapters: frozenset[str] = frozenset()
    room_bytes: float = float("inf")
    number: int = 1
    heard: int = 0
    draining: bool = False
    step_rows: int | None = None
    seats: float = float("inf")
    kv_tokens: float = float("inf")
    kernel: Kernel | None = None
    pace: Pace = AS_PROFILED
    waiting: int = 0
    kv_used_tokens: float = 0.0

    def has_room(self, adapter: AdapterRef) -> bool:
        """Return whether a request for `adapter`, which the plan does not keep here, need not wait for
        memory.

        Without any room those that use it already may be waiting themselves.
        """
        return self.room_bytes > (0 if adapter.digest in self.adapters else adapter.nbytes)

    def plus(self, ask: RouteRequest, times: int) -> "NodeLoad":
        """Return the load with `times` as many requests like `ask` on it.

        One for an adapter already there adds tokens and no rank. Any other is taken to need room, since this
        does not know what is kept there.
        """
        is_there = ask.adapter.digest in self.adapters
        more = AdapterLoad(0 if is_there else ask.adapter.rank, ask.prompt_tokens * times, 0)
        work = self.work
        return NodeLoad(  # not `replace`, which takes as long as the rest of a decision
            requests=self.requests + times,
            work=StepLoad((*work.adapters, more), work.context_tokens, work.prompt_pairs),
            adapters=self.adapters if is_there else self.adapters | {ask.adapter.digest},
            room_bytes=self.room_bytes - (0 if is_there else ask.adapter.nbytes * times),
            number=self.number,
            heard=self.heard,
            draining=self.draining,
            step_rows=self.step_rows,
            seats=self.seats,
            kv_tokens=self.kv_tokens,
            kernel=self.kernel,
            pace=self.pace,
        )


_FETCH_LATENCY_S, _FETCH_BYTES_PER_S = 0.002, 25e9


def fetch_s(nbytes: int) -> float:
    """Return how long an adapter of so many bytes is taken to come from a peer."""
    return _FETCH_LATENCY_S + nbytes / _FETCH_BYTES_PER_S


Loads = Mapping[str, NodeLoad]  # of the nodes that can be reached


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
