"""The seam of routing policies: what a front door knows when a request comes, and how it answers.

A front door knows the routing table and what nodes last said of their load; it may be wrong about both, and a
node takes what it is sent. Chance is an argument.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost import StepLoad
from scheduler.cluster.state import RoutingTable, Shares, normalised


class NoNodeReachable(RuntimeError):
    """There is no node to send a request to; the remedy is to wait for one, or to start one."""

    def __init__(self, adapter: AdapterRef) -> None:
        super().__init__(f"adapter={adapter.name!r}: no node is reachable; retry, or start a node")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to be routed. `cached_tokens` is how much of the prompt each node is believed to have in its
    prefix cache; nodes not named have none."""

    adapter: AdapterRef
    prompt_tokens: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What a node last said: requests on it, and in `work` its queued prompt tokens and decoding sequences by
    adapter, with the K/V tokens they read."""

    requests: int
    work: StepLoad


Loads = Mapping[str, NodeLoad]  # of the nodes that can be reached


class RoutingPolicy(Protocol):
    """Chooses the node that runs a request, among those of `loads`."""

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """A node's name; raises NoNodeReachable if `loads` is empty."""
        ...


def reachable_shares(ask: Ask, table: RoutingTable, loads: Loads) -> Shares:
    """The adapter's shares on reachable nodes, summing to 1; all reachable nodes alike if it has none
    there."""
    if not loads:
        raise NoNodeReachable(ask.adapter)
    planned = normalised((s.node, s.part) for s in table.shares.get(ask.adapter, ()) if s.node in loads)
    return planned or normalised((node, 1.0) for node in loads)


def drawn(shares: Shares, rng: np.random.Generator) -> str:
    """A node, drawn with the probability of its part."""
    bounds = list(accumulate(share.part for share in shares))
    return shares[min(bisect_right(bounds, rng.random()), len(shares) - 1)].node
